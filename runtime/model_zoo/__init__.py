"""Small models to start from: each is one file, meant to be read and then replaced by your own."""

from runtime.model_zoo.convnet import ConvNet
from runtime.model_zoo.encoder_classifier import EncoderClassifier
from runtime.model_zoo.gpt import GPT
from runtime.model_zoo.matrix_factorization import MatrixFactorization
from runtime.model_zoo.mlp import MLP
from runtime.model_zoo.ngrams import NGramClassifier
from runtime.model_zoo.tabular import TabularMLP

__all__ = ["GPT", "MLP", "ConvNet", "EncoderClassifier", "MatrixFactorization", "NGramClassifier", "TabularMLP"]
