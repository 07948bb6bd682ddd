"""Padding collate and random transforms."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from runtime.data.collating import Padded
from runtime.data.transforms import Augment
from runtime.errors import DataError

pytestmark = pytest.mark.single

SEQUENCES = [torch.arange(1, n + 1) for n in (3, 5, 1)]


def test_padding_is_torchs() -> None:
    expected = pad_sequence(SEQUENCES, batch_first=True, padding_value=-7)
    assert Padded(-7)(SEQUENCES).equal(expected)
    matrices = [torch.randn(n, 4, 2) for n in (3, 5, 1)]
    assert Padded(0)(matrices).equal(pad_sequence(matrices, batch_first=True))


def test_nested_samples_masks_lengths_and_values() -> None:
    samples = [
        {"inputs": {"tokens": s, "segment": s.tolist()}, "target": (s * 2).numpy(), "size": len(s), "id": f"n{len(s)}"}
        for s in SEQUENCES
    ]
    collate = Padded(
        parts={"inputs.tokens": 0, "inputs.segment": 9, "target": -100}, multiple_of=4, mask="mask", lengths="length"
    )
    batch = collate(samples)
    assert batch["inputs"]["tokens"].tolist() == [[1, 2, 3] + [0] * 5, [1, 2, 3, 4, 5, 0, 0, 0], [1] + [0] * 7]
    assert batch["inputs"]["segment"][2].tolist() == [1] + [9] * 7
    assert batch["target"][0].tolist() == [2, 4, 6] + [-100] * 5
    assert batch["mask"].equal(batch["inputs"]["tokens"] != 0)
    assert batch["length"].tolist() == [3, 5, 1]
    assert batch["size"].tolist() == [3, 5, 1]
    assert batch["id"] == ["n3", "n5", "n1"]


def test_tuples_keep_their_type_and_get_further_parts_at_the_end() -> None:
    pair = namedtuple("pair", ["tokens", "label"])
    samples = [(s, torch.tensor(len(s))) for s in SEQUENCES]
    tokens, label, mask, length = Padded(0, parts=[0], mask="m", lengths="l")(samples)
    assert (tokens.shape, label.tolist(), mask.sum().item(), length.tolist()) == ((3, 5), [3, 5, 1], 9, [3, 5, 1])
    named = Padded(0)([pair(s, 1) for s in SEQUENCES])
    assert isinstance(named, pair)
    assert named.label.tolist() == [1, 1, 1]


def test_parts_of_equal_length_are_padded_only_where_they_are_sequences() -> None:
    samples = [{"tokens": torch.ones(3), "features": torch.ones(3)} for _ in range(2)]
    batch = Padded(0, parts=["tokens"], multiple_of=8)(samples)
    assert (batch["tokens"].shape, batch["features"].shape) == ((2, 8), (2, 3))


@pytest.mark.parametrize(
    ("make", "samples", "words"),
    [
        (lambda: Padded(0, multiple_of=8), [], "need 'parts'"),
        (lambda: Padded(0, parts=["tokns"]), [{"tokens": torch.ones(2)}], "did you mean 'tokens'"),
        (
            lambda: Padded(0, parts=["a"]),
            [{"a": torch.ones(2), "b": torch.ones(n)} for n in (1, 2)],
            "'b' differs",
        ),
        (Padded, [{"a": 1}, {"b": 1}], "differ in their keys"),
        (Padded, [(1,), (1, 2)], "number of parts"),
        (Padded, [torch.ones(2, 3), torch.ones(3, 4)], "all but its first axis"),
        (lambda: Padded(parts=["a"], mask="a"), [{"a": torch.ones(2)}], "choose another name"),
    ],
)
def test_what_cannot_be_padded_is_told(make: Any, samples: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make()(samples)


def test_augmented_images_are_crops_of_the_padded_image_some_of_them_mirrored() -> None:
    image = torch.arange(1.0, 26).view(1, 5, 5)
    padded = np.pad(image.numpy(), [(0, 0), (1, 1), (1, 1)])
    windows = {(t, l): padded[:, t : t + 4, l : l + 4] for t in range(4) for l in range(4)}  # noqa: E741
    torch.manual_seed(0)
    seen = set()
    for _ in range(300):
        found = Augment(crop=[4, 4], padding=1, flip=0.5)((image, 3))
        assert found[1] == 3
        plain, mirrored = found[0].numpy(), found[0].flip(-1).numpy()
        seen |= {(*at, False) for at, window in windows.items() if (window == plain).all()}
        seen |= {(*at, True) for at, window in windows.items() if (window == mirrored).all()}
    assert len(seen) == 32  # every place, mirrored and not


def test_scaled_crops_cover_the_asked_share_of_the_area() -> None:
    plane = torch.stack(torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 60), indexing="ij"))
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        found = Augment(crop=[16, 16], scale=[0.2, 0.6])({"inputs": plane})["inputs"]
        height, width = (float(found[axis].max() - found[axis].min()) * 16 / 15 for axis in (0, 1))
        shares.append(height * width)
    assert 0.15 < min(shares) < 0.25
    assert 0.5 < max(shares) < 0.66
    assert found.shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Augment, "nothing to do"),
        (lambda: Augment(scale=[0.1, 1]), "'scale' needs 'crop'"),
        (lambda: Augment(crop=[9, 9])((torch.ones(1, 4, 4), 0)), "smaller than crop"),
        (lambda: Augment(flip=1.0)({"image": torch.ones(1, 4, 4)}), "no part 'inputs'"),
        (lambda: Augment(flip=1.0)((torch.ones(4, 4), 0)), "channels, height, width"),
    ],
)
def test_what_cannot_be_augmented_is_told(make: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        make()
