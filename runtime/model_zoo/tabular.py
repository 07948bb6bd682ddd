"""An MLP on the columns of a table: numbers, and categories with a vector each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from runtime.model_zoo.mlp import MLP


class TabularMLP(nn.Module):
    """Predict from numbers and category codes, as ``Table`` with ``categorical_as: codes`` gives them.

    A number may be turned into a vector first: sines and cosines of it at learned frequencies, then a linear layer and ReLU
    (Gorishniy, Rubachev and Babenko 2022, "On Embeddings for Numerical Features in Tabular Deep Learning", section 3.3; the
    linear layer is shared by all columns). It lets a small network bend more than straight numbers do.

    Args:
        num_numeric: columns of numbers.
        cardinalities: categories of each categorical column; code 0 is any unknown one.
        hidden: width of each hidden layer in order.
        out_features: classes, or predicted values.
        embedding_width: length of a category's vector.
        frequencies: sines of each number; 0: the number itself.
        frequency_scale: standard deviation of the frequencies at the start, in turns per standard deviation of a column.
        numeric_width: length of a number's vector; only with frequencies.
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
            categorical: (batch, columns) int64; not given where there are no such columns.

        Returns:
            (batch, out_features) float.
        """
        parts = [numeric]
        if self.frequencies is not None:
            turns = 2 * torch.pi * numeric.unsqueeze(-1) * self.frequencies
            parts = [self.numbers(torch.cat([turns.sin(), turns.cos()], dim=-1)).flatten(1)]
        if categorical is not None:
            parts += [table(categorical[:, column]) for column, table in enumerate(self.embeddings)]
        output: Tensor = self.mlp(torch.cat(parts, dim=1))
        return output
