"""An MLP on the columns of a table: numbers, and embedded categories."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from runtime.model_zoo.mlp import MLP


class TabularMLP(nn.Module):
    """Predict from numbers and category codes, the output of ``Table`` with ``categorical_as: codes``.

    Numbers may be embedded first: sines and cosines at learned frequencies, then a linear layer and ReLU (Gorishniy,
    Rubachev and Babenko 2022, "On Embeddings for Numerical Features in Tabular Deep Learning", section 3.3; the linear layer
    is shared by all columns). A small network can then fit more nonlinear functions than with plain numbers.

    Args:
        num_numeric: number of numeric columns.
        cardinalities: number of categories of each categorical column; code 0 is for unknown ones.
        hidden: width of each hidden layer in order.
        out_features: classes, or predicted values.
        embedding_width: size of a category's embedding.
        frequencies: learned frequencies of each number; 0: use the number itself.
        frequency_scale: initial standard deviation of the frequencies, in cycles per standard deviation of a column.
        numeric_width: size of a number's embedding; only with frequencies.
        dropout: probability of zeroing a hidden activation while training.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        num_numeric: int,
        hidden: list[int],
        out_features: int,
        *,
        cardinalities: Sequence[int] = (),
        embedding_width: int = 8,
        frequencies: int = 0,
        frequency_scale: float = 0.1,
        numeric_width: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_numeric + len(cardinalities) < 1 or min([*cardinalities, embedding_width, numeric_width]) < 1:
            raise ValueError("give at least one column, and sizes of at least 1")
        if min(num_numeric, frequencies) < 0 or frequency_scale <= 0:
            raise ValueError("num_numeric and frequencies must not be negative, frequency_scale must be above 0")
        self.embeddings = nn.ModuleList(nn.Embedding(size + 1, embedding_width) for size in cardinalities)
        self.frequencies: nn.Parameter | None = None
        width = 1
        if frequencies and num_numeric:
            self.frequencies = nn.Parameter(frequency_scale * torch.randn(num_numeric, frequencies))
            self.numbers = nn.Sequential(nn.Linear(2 * frequencies, numeric_width), nn.ReLU())
            width = numeric_width
        features = num_numeric * width + len(cardinalities) * embedding_width
        self.mlp = MLP(features, hidden, out_features, dropout=dropout)

    def forward(self, numeric: Tensor, categorical: Tensor | None = None) -> Tensor:
        """Return the output for each row.

        Args:
            numeric: (batch, num_numeric) float, standardised.
            categorical: (batch, columns) int64; None if there are no such columns.

        Returns:
            (batch, out_features) float.
        """
        parts = [numeric]
        if self.frequencies is not None:
            angles = 2 * torch.pi * numeric.unsqueeze(-1) * self.frequencies
            parts = [self.numbers(torch.cat([angles.sin(), angles.cos()], dim=-1)).flatten(1)]
        if categorical is not None:
            parts += [table(categorical[:, column]) for column, table in enumerate(self.embeddings)]
        output: Tensor = self.mlp(torch.cat(parts, dim=1))
        return output
