"""Small models to start from: each is one file, meant to be read and then replaced by your own."""

from runtime.model_zoo.convnet import ConvNet
from runtime.model_zoo.gpt import GPT
from runtime.model_zoo.mlp import MLP

__all__ = ["GPT", "MLP", "ConvNet"]
