"""A text classifier on byte n-grams."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FACTOR = 1_000_003  # prime; products stay far below 2**63


class NGramClassifier(nn.Module):
    """Classify texts by an MLP on the mean embedding of their byte n-grams, each hashed into a table.

    Like fastText (Joulin et al. 2016, "Bag of Tricks for Efficient Text Classification"), but on bytes instead of words: no
    vocabulary, any language, and misspelt words share most of their n-grams.

    Args:
        num_classes: number of classes; 1 gives a single score per text, for binary losses.
        max_length: longest n-gram, in bytes; all shorter ones are used too.
        num_buckets: rows of the table; n-grams that share a row are not distinguished.
        width: size of an embedding.
        hidden: width of the hidden layer.
        dropout: probability of zeroing a feature of the text, and of the hidden layer, while training.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        max_length: int = 5,
        num_buckets: int = 65536,
        width: int = 32,
        hidden: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(num_classes, max_length, num_buckets, width, hidden) < 1:
            raise ValueError("num_classes, max_length, num_buckets, width and hidden must each be at least 1")
        self._max_length, self._num_buckets = max_length, num_buckets
        # Row 0 is for n-grams that reach into the padding, which are left out of the mean.
        self.table = nn.EmbeddingBag(num_buckets + 1, width, mode="mean", padding_idx=0)
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores of each text; they do not depend on the amount of padding.

        Args:
            inputs: (batch, length) int64, bytes; 0 is padding.

        Returns:
            logits: (batch, num_classes) float, or (batch,) for one class.
        """
        logits: Tensor = self.layers(self.table(self.rows(inputs)))
        return logits.squeeze(1) if logits.shape[1] == 1 else logits

    def rows(self, inputs: Tensor) -> Tensor:
        """Return the table's row of each n-gram, (batch, max_length * length); 0 where it reaches into the padding."""
        hashed = torch.zeros_like(inputs)
        rows: list[Tensor] = []
        for size in range(self._max_length):
            byte = F.pad(inputs, (0, size))[:, size:]
            hashed = torch.where(byte == 0, -1, (hashed * _FACTOR + byte + 1) % 2_147_483_647)
            # Sizes share the table; the added offset makes their hashes differ.
            rows.append(torch.where(hashed < 0, 0, (hashed + size * 40_503) % self._num_buckets + 1))
        return torch.cat(rows, dim=1)
