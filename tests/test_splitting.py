"""Random splits: exact sizes, class shares within one sample, whole groups, and the impossible refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from runtime.data.splitting import Subset, split_ids, subset
from runtime.errors import DataError
from tests.project.tiny import Ids, points


def as_parts(parts: dict[str, np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate(list(parts.values())))


@given(size=st.integers(3, 500), seed=st.integers(-3, 3), share=st.floats(0.05, 0.45), count=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_every_sample_is_in_one_part_and_sizes_are_exact(size: int, seed: int, share: float, count: int) -> None:
    held = int(share * size + 0.5)
    assume(held >= 1 and size - held - count >= 1)
    parts = split_ids(size, {"validation": share, "test": count}, seed=seed)
    assert as_parts(parts).tolist() == list(range(size))
    assert {name: len(ids) for name, ids in parts.items()} == {
        "validation": held,
        "test": count,
        "train": size - held - count,
    }
    again = split_ids(size, {"validation": share, "test": count}, seed=seed)
    assert all((again[name] == ids).all() for name, ids in parts.items())


def test_every_sample_is_held_out_about_equally_often_and_another_seed_is_another_split() -> None:
    draws = 600
    held = np.zeros(30)
    for seed in range(draws):
        held[split_ids(30, {"validation": 0.2}, seed=seed)["validation"]] += 1
    assert held.sum() == draws * 6
    assert abs(held / draws - 0.2).max() < 0.07  # four standard deviations


@given(
    members=st.lists(st.integers(2, 60), min_size=2, max_size=12),
    shares=st.tuples(st.floats(0.05, 0.4), st.floats(0.05, 0.4)),
    seed=st.integers(0, 5),
)
@settings(max_examples=70, deadline=None)
def test_stratified_parts_have_exact_sizes_and_each_class_within_one_sample(
    members: list[int], shares: tuple[float, float], seed: int
) -> None:
    classes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(members)), members))
    total, held_out = len(classes), dict(zip(("validation", "test"), shares, strict=True))
    sizes = {name: int(share * total + 0.5) for name, share in held_out.items()}
    sizes["train"] = total - sum(sizes.values())
    assume(min(sizes.values()) >= len(members))
    parts = split_ids(total, held_out, seed=seed, stratify=classes)
    assert as_parts(parts).tolist() == list(range(total))
    for name, ids in parts.items():
        assert len(ids) == sizes[name]
        counts = np.bincount(classes[ids], minlength=len(members))
        exact = np.array(members) * sizes[name] / total
        assert (abs(counts - exact) < 1).all()


def test_stratified_shares_are_those_of_scikit_learn_within_a_sample() -> None:
    from sklearn.model_selection import train_test_split

    classes = np.repeat(["cat", "dog", "newt"], [500, 83, 17])
    _, theirs = train_test_split(np.arange(600), test_size=150, stratify=classes, random_state=0)
    ours = split_ids(600, {"test": 150}, seed=0, stratify=classes)["test"]
    for label in ("cat", "dog", "newt"):
        assert abs((classes[ours] == label).sum() - (classes[theirs] == label).sum()) <= 1


@given(
    members=st.lists(st.integers(1, 9), min_size=8, max_size=40),
    share=st.floats(0.1, 0.3),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_a_group_is_in_one_part_and_sizes_are_near(members: list[int], share: float, seed: int) -> None:
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(members)), members))
    size = int(share * len(groups) + 0.5)
    assume(size > max(members))
    parts = split_ids(len(groups), {"validation": share, "test": share}, seed=seed, group=groups)
    assert as_parts(parts).tolist() == list(range(len(groups)))
    found = [set(groups[ids].tolist()) for ids in parts.values()]
    assert sum(map(len, found)) == len(set().union(*found)) == len(members)
    assert all(abs(len(parts[name]) - size) <= max(members) / 2 for name in ("validation", "test"))


def test_groups_are_disjoint_as_scikit_learns_are_and_their_size_does_not_decide() -> None:
    from sklearn.model_selection import GroupShuffleSplit

    groups = np.array(["a", "b", "c", "d"]).repeat(25)
    (train, test), *_ = GroupShuffleSplit(1, test_size=0.25, random_state=0).split(groups, groups=groups)
    ours = split_ids(100, {"test": 0.25}, seed=0, group=groups)
    assert (len(ours["train"]), len(ours["test"])) == (len(train), len(test))
    assert not set(groups[ours["train"]]) & set(groups[ours["test"]])
    chosen = [groups[split_ids(100, {"test": 0.25}, seed=s, group=groups)["test"]][0] for s in range(200)]
    assert min(chosen.count(group) for group in "abcd") > 25


@pytest.mark.parametrize(
    ("held_out", "values", "words"),
    [
        ({"validation": 0.01}, {}, "none for the validation part"),
        ({"validation": 10}, {}, "none for the train part"),
        ({"validation": 0.3}, {"stratify": np.array([0] * 9 + [1])}, "class 1 has a single sample"),
        ({"validation": 0.2}, {"stratify": np.repeat(range(5), 2)}, "2 samples in the validation part cannot have 5"),
        ({"validation": 0.2}, {"group": np.zeros(10)}, "no group is small enough"),
        ({"validation": 9}, {"group": np.repeat([0, 1], 5)}, "leave none for the train part"),
    ],
)
def test_impossible_splits_are_refused(held_out: dict[str, Any], values: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        split_ids(10, held_out, seed=0, **values)


def test_a_subset_is_read_as_its_data_set_is() -> None:
    part = Subset(Ids(10), np.array([7, 2, 5]))
    assert part.deterministic
    assert (len(part), int(part[1]), part.__getitems__([0, 2]).tolist()) == (3, 2, [7, 5])
    tensors = points("train", 10)
    found = subset(tensors, np.array([7, 2]))
    assert isinstance(found, TensorDataset)
    assert found.tensors[0].equal(tensors.tensors[0][[7, 2]])
    assert Subset(list("abcdef"), np.array([1, 3])).__getitems__([0, 1]) == ["b", "d"]
