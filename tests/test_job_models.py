"""The models of the shipped jobs against plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.model_zoo import EncoderClassifier, MatrixFactorization, NGramClassifier, TabularMLP


def test_matrix_factorization_is_a_product_of_matrices() -> None:
    model = MatrixFactorization(4, 5, 3)
    table = model.users.weight @ model.items.weight.T
    user, item = torch.tensor([0, 3, 3]), torch.tensor([4, 0, 2])
    torch.testing.assert_close(model(user, item), table[user, item])


# Texts by their n-grams


def as_bytes(text: str, length: int) -> list[int]:
    return [*text.encode(), *[0] * (length - len(text.encode()))]


def test_rows_stand_for_the_n_grams_of_a_text() -> None:
    """In a large table, which these few do not share rows of, rows are equal exactly where n-grams of the text are."""
    model = NGramClassifier(2, max_length=3, num_buckets=2**20, width=1)
    text = "abab ab"
    rows = model.rows(torch.tensor([as_bytes(text, 9)]))[0].tolist()
    grams = [
        text[start : start + size] if start + size <= len(text) else "" for size in (1, 2, 3) for start in range(9)
    ]
    place: dict[str, Any] = {}
    for gram, row in zip(grams, rows, strict=True):
        assert (row == 0) == (gram == "")
        assert place.setdefault(gram, row) == row
    assert len(set(place.values())) == len(place)


def test_a_text_is_the_mean_of_its_n_grams_however_far_it_is_padded() -> None:
    model = NGramClassifier(3, max_length=2, num_buckets=97, width=4, hidden=5).eval()
    short, padded = (
        torch.tensor([as_bytes("spam", 4)]),
        torch.tensor([as_bytes("spam", 11), as_bytes("a longer on", 11)]),
    )
    rows = model.rows(short)
    expected = model.layers(model.table.weight[rows[rows > 0]].mean(0, keepdim=True))
    torch.testing.assert_close(model(short), expected)
    torch.testing.assert_close(model(padded)[:1], expected)
    assert NGramClassifier(1)(padded).shape == (2,)


# Tables


def test_a_category_has_its_vector_and_a_number_stands_for_itself() -> None:
    model = TabularMLP(2, [], 1, cardinalities=[3, 2], embedding_width=4)
    numeric, categorical = torch.randn(5, 2), torch.tensor([[0, 0], [1, 2], [3, 1], [2, 2], [0, 1]])
    weights = [table.get_parameter("weight") for table in model.embeddings]
    first, second = (weight[categorical[:, column]] for column, weight in enumerate(weights))
    (layer,) = model.mlp.layers
    torch.testing.assert_close(model(numeric, categorical), layer(torch.cat([numeric, first, second], 1)))
    assert [tuple(weight.shape) for weight in weights] == [(4, 4), (3, 4)]


def test_a_number_with_frequencies_becomes_sines_and_cosines() -> None:
    model = TabularMLP(2, [], 1, frequencies=3, numeric_width=4)
    numeric = torch.randn(5, 2)
    (layer,) = model.mlp.layers
    expected = []
    assert model.frequencies is not None
    for column in range(2):
        angle = 2 * torch.pi * numeric[:, column : column + 1] * model.frequencies[column]
        expected.append(model.numbers[0](torch.cat([torch.sin(angle), torch.cos(angle)], 1)).relu())
    torch.testing.assert_close(model(numeric), layer(torch.cat(expected, 1)))


# A pretrained encoder


class Encoder(nn.Module):
    """Looks tokens up and adds noise to the padding, as attention does."""

    config = SimpleNamespace(hidden_size=4)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(input_ids) + 7 * (1 - attention_mask.unsqueeze(-1)))


def test_a_text_is_the_mean_of_its_tokens_encodings() -> None:
    encoder = Encoder()
    model = EncoderClassifier(encoder, 3)
    tokens = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    means = torch.stack([encoder.table.weight[[1, 2, 3]].mean(0), encoder.table.weight[[4, 5, 6, 7]].mean(0)])
    torch.testing.assert_close(model(tokens, mask), model.head(means))


@pytest.mark.parametrize(
    "build",
    [
        lambda: MatrixFactorization(0, 5, 3),
        lambda: NGramClassifier(2, max_length=0),
        lambda: TabularMLP(0, [4], 1),
        lambda: TabularMLP(2, [4], 1, frequencies=-1),
        lambda: EncoderClassifier(nn.Identity(), 3),
        lambda: EncoderClassifier(Encoder(), 0),
    ],
)
def test_impossible_sizes_are_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"must|give"):
        build()
