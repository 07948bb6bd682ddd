"""A multilayer perceptron: linear layers with a nonlinearity between them."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class MLP(nn.Module):
    """Map feature vectors to scores or predictions.

    The last layer is linear, so the output is logits for classification and values for regression.

    Args:
        in_features: features of one sample.
        hidden: width of each hidden layer in order; empty gives a linear model.
        out_features: classes, or predicted values; 1 keeps its dimension, as regression losses
            expect targets of shape (batch, 1).
        activation: name of the nonlinearity, a key of ``ACTIVATIONS``.
        dropout: probability of zeroing a hidden activation while training.

    Raises:
        ValueError: a size is below 1, dropout is outside [0, 1) or the activation is unknown.
    """

    def __init__(
        self,
        in_features: int,
        hidden: list[int],
        out_features: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden, out_features]
        if min(widths) < 1:
            raise ValueError(
                f"in_features={in_features}, hidden={hidden}, out_features={out_features}: "
                "every size must be at least 1"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: use one of {', '.join(ACTIVATIONS)}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout}: it must be at least 0 and below 1")

        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths[:-1]):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation](), nn.Dropout(dropout)]
        layers.append(nn.Linear(widths[-2], out_features))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Return the output for each sample.

        Args:
            features: (batch, in_features) float.

        Returns:
            (batch, out_features) float.
        """
        output: Tensor = self.layers(features)
        return output
