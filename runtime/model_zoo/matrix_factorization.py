"""Matrix factorisation: the score of a user and an item is the dot product of their embeddings."""

from __future__ import annotations

from torch import Tensor, nn


class MatrixFactorization(nn.Module):
    """Score items for users by the dot product of their embeddings (Koren, Bell and Volinsky 2009).

    Args:
        num_users: number of users, numbered from 0.
        num_items: number of items, numbered from 0.
        width: size of an embedding.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, num_users: int, num_items: int, width: int) -> None:
        super().__init__()
        if min(num_users, num_items, width) < 1:
            raise ValueError(f"num_users={num_users}, num_items={num_items}, width={width}: each must be at least 1")
        self.users = nn.Embedding(num_users, width)
        self.items = nn.Embedding(num_items, width)
        for table in (self.users, self.items):
            nn.init.xavier_normal_(table.weight)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Return one score for each pair.

        Args:
            user: (batch,) int64.
            item: (batch,) int64.

        Returns:
            (batch,) float.
        """
        scores: Tensor = (self.users(user) * self.items(item)).sum(-1)
        return scores
