"""Data of installed packages: found without importing them, and missed with the line that installs them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.data.order import IndexOrder
from runtime.data_sources import Candidates, Choices, TrecQuestions, existing_folder
from runtime.errors import DataError
from runtime.files import existing
from tests.reading import equal, read_steps

RATIOS: dict[str, Any] = {"validation": 0.2, "test": 0.1}
SIZES = [1, 2, 3, 9, 10, 25, 40]  # choices of each user, among 60 items


def install(folder: Path, package: str, files: dict[str, bytes]) -> Path:
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text("raise ImportError('needs what nobody installed')")
    for name, content in files.items():
        (folder / package / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / package / name).write_bytes(content)
    return folder


def write_choices(path: Path) -> dict[int, set[int]]:
    """Write users 1 to 7 with names that sort otherwise as texts, in random row order; return their choices, from 0."""
    generator = np.random.default_rng(3)
    chosen = {user: set(generator.choice(60, size, replace=False).tolist()) for user, size in enumerate(SIZES)}
    chosen[6] |= set(range(0, 60, 2))
    chosen[5] |= set(range(1, 60, 2))  # so that every item is chosen by somebody
    rows = [f"{user + 5}\t{item + 1}\t4" for user, items in chosen.items() for item in items]
    generator.shuffle(rows)
    path.write_text("\n".join(["user_id:token\titem_id:token\trating:float", *rows, ""]))
    return chosen


@pytest.fixture
def choices(tmp_path: Path) -> tuple[str, dict[int, set[int]]]:
    return str(tmp_path / "ml.inter"), write_choices(tmp_path / "ml.inter")


def pairs(data: Choices, users: str = "user", items: str = "positive") -> list[tuple[int, int]]:
    batch = data.__getitems__(list(range(len(data))), np.arange(len(data), dtype=np.uint64))
    return list(zip(batch[users].tolist(), batch[items].tolist(), strict=True))


def held_out(path: str, split: str) -> dict[int, set[int]]:
    data = Candidates(path, split, **RATIOS)
    batch = data.__getitems__(list(range(len(data))))
    found: dict[int, set[int]] = {}
    for user, item, target in zip(*(part.tolist() for part in batch.values()), strict=True):
        found.setdefault(user, set())
        if target:
            found[user].add(item)
    return found


# Where data is found


def test_data_is_found_in_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "some_data", {"tables/a.csv": b"x"})
    monkeypatch.syspath_prepend(tmp_path)
    assert existing("package:some_data/tables/a.csv") == tmp_path / "some_data" / "tables" / "a.csv"
    assert existing_folder("package:some_data/tables") == str(tmp_path / "some_data" / "tables")


def test_data_is_found_in_the_folder_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "some_data", {"a.csv": b"x"})
    (tmp_path / "usr" / "share").mkdir(parents=True)
    (tmp_path / "usr" / "share" / "there").write_text("x")
    with pytest.raises(DataError):
        existing("package:some_data/a.csv")
    monkeypatch.setenv("LOCKSTEP_DATA", str(tmp_path))
    assert existing("package:some_data/a.csv").read_bytes() == b"x"
    assert existing("/usr/share/there") == tmp_path / "usr" / "share" / "there"


def test_an_installed_package_comes_before_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("installed", "elsewhere"):
        install(tmp_path / name, "some_data", {"a.csv": name.encode()})
    monkeypatch.setenv("LOCKSTEP_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.syspath_prepend(tmp_path / "installed")
    assert existing("package:some_data/a.csv").read_bytes() == b"installed"


def test_a_missing_package_is_told_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"'no_such_data'.*is not installed: pip install --no-deps no-such-data==2$"):
        existing("package:no_such_data/a.csv", provided_by="pip install --no-deps no-such-data==2")
    monkeypatch.setenv("LOCKSTEP_DATA", str(install(tmp_path, "some_data", {})))
    with pytest.raises(
        DataError, match=r"installed, but without a\.csv; another version has it: pip install some-data"
    ):
        existing("package:some_data/a.csv", provided_by="pip install some-data")


# TREC questions


QUESTIONS = ["NUM:temp How hot is it ?", "HUM:ind Who is Ren\xe9 ?", "NUM:count How many ?", "LOC:city Where ?"]


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "questions.txt"
    path.write_bytes("\n".join(["ABBR:exp What is X ?", *QUESTIONS, ""]).encode("latin-1"))
    return str(path)


def test_the_last_questions_are_read_with_their_classes(questions: str) -> None:
    coarse, fine = TrecQuestions(questions, last=4), TrecQuestions(questions, last=4, fine=True)
    assert [sample["inputs"] for sample in coarse.__getitems__([0, 1])] == ["How hot is it ?", "Who is Ren\xe9 ?"]
    assert (coarse.classes, coarse.column("target").tolist()) == (["HUM", "LOC", "NUM"], [2, 0, 2, 1])
    assert [fine.classes[sample["target"]] for sample in fine.__getitems__(list(range(4)))] == [
        q.split()[0] for q in QUESTIONS
    ]
    assert len(TrecQuestions(questions, last=None)) == 5
    assert coarse.fingerprint != fine.fingerprint


def test_a_tokenizer_sees_the_questions_of_a_microbatch(questions: str) -> None:
    def tokenizer(texts: list[str], shift: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(word) + shift for word in text.split()] for text in texts]}

    data = TrecQuestions(
        questions,
        last=4,
        tokenizer=tokenizer,  # type: ignore[arg-type]  # whose other arguments tokenize holds
        tokenize={"shift": 100},
    )
    assert data.__getitems__([2, 3]) == [
        {"input_ids": [103, 104, 101], "target": 2},
        {"input_ids": [105, 101], "target": 1},
    ]


def test_wrong_questions_are_refused(questions: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"last=5452: .* has 5 questions"):
        TrecQuestions(questions)
    (tmp_path / "other.txt").write_text("NUM:temp Really ?\nno label here\n")
    with pytest.raises(DataError, match="question 2 does not begin with COARSE:fine"):
        TrecQuestions(str(tmp_path / "other.txt"), last=None)


# Choices of users


def test_the_parts_share_out_every_users_choices(choices: tuple[str, dict[int, set[int]]]) -> None:
    path, chosen = choices
    train: dict[int, set[int]] = {}
    for user, item in pairs(Choices(path, **RATIOS)):
        train.setdefault(user, set()).add(item)
    validation, test = held_out(path, "validation"), held_out(path, "test")
    for user, items in chosen.items():
        parts = [train[user], validation.get(user, set()), test.get(user, set())]
        assert set.union(*parts) == items
        assert sum(map(len, parts)) == len(items)
        # RecBole's rule: rounded down, but one at least, as long as one is left to train on; the test part comes first.
        size = len(items)
        of_test = max(int(0.1 * size), 1) if size > 1 else 0
        of_validation = max(int(0.2 * size), 1) if size - of_test > 1 else 0
        assert (len(parts[2]), len(parts[1])) == (of_test, of_validation)


def test_candidates_are_all_items_but_those_of_earlier_parts(choices: tuple[str, dict[int, set[int]]]) -> None:
    path, chosen = choices
    train = Counter(user for user, _ in pairs(Choices(path, **RATIOS)))
    validation = held_out(path, "validation")
    for split, left_out in (
        ("validation", train),
        ("test", train + Counter({u: len(i) for u, i in validation.items()})),
    ):
        data = Candidates(path, split, **RATIOS)
        batch = data.__getitems__(list(range(len(data))))
        rows = Counter(batch["user"].tolist())
        assert len(set(zip(batch["user"].tolist(), batch["item"].tolist(), strict=True))) == len(data)
        assert rows == {user: 60 - left_out[user] for user in held_out(path, split)}
        assert set(rows) <= set(chosen)


def test_another_seed_is_another_split_and_another_fingerprint(choices: tuple[str, dict[int, set[int]]]) -> None:
    path, _ = choices
    first, second = Choices(path, **RATIOS), Choices(path, **RATIOS, seed=1)
    assert sorted(pairs(first)) != sorted(pairs(second))
    assert first.fingerprint != second.fingerprint
    assert sorted(pairs(first)) == sorted(pairs(Choices(path, **RATIOS)))


def test_negative_items_are_drawn_evenly_from_what_was_not_chosen(choices: tuple[str, dict[int, set[int]]]) -> None:
    path, _ = choices
    data = Choices(path, **RATIOS)
    taken = set(pairs(data))
    seeds = np.random.default_rng(0).integers(2**63, size=400 * len(data)).astype(np.uint64)
    batch = data.__getitems__(list(range(len(data))) * 400, seeds)
    drawn = Counter(zip(batch["user"].tolist(), batch["negative"].tolist(), strict=True))
    assert not taken & set(drawn)
    user = 6
    free = [item for item in range(60) if (user, item) not in taken]
    counts = np.array([drawn[user, item] for item in free])
    expected = counts.sum() / len(free)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    # Mean degrees of freedom, variance twice that: five deviations above it.
    assert chi_squared < (len(free) - 1) + 5 * (2 * (len(free) - 1)) ** 0.5


def test_negative_items_depend_on_seed_epoch_and_sample_alone(choices: tuple[str, dict[int, set[int]]]) -> None:
    data = Choices(choices[0], **RATIOS)
    order = partial(IndexOrder, len(data), batch_size=16, seed=3, shuffle=True, drop_last=False)
    one = read_steps(data, order)
    for world_size, num_workers, slots in ((2, 0, 4), (3, 0, 4), (1, 2, 4)):
        assert equal(one, read_steps(data, order, world_size=world_size, num_workers=num_workers, slots=slots))
    whole = {cursor: torch.cat([slot["negative"] for slot in step]) for cursor, step in one.items()}
    for cursor, step in read_steps(data, order, slots=2).items():
        assert torch.equal(whole[cursor], torch.cat([slot["negative"] for slot in step]))
    epochs = [
        {
            (user, positive): negative
            for cursor, step in one.items()
            if cursor.epoch == epoch
            for slot in step
            for user, positive, negative in zip(*(part.tolist() for part in slot.values()), strict=True)
        }
        for epoch in (0, 1)
    ]
    assert epochs[0].keys() == epochs[1].keys()
    assert epochs[0] != epochs[1]


def test_a_user_of_all_items_and_shares_of_everything_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "all.inter"
    path.write_text("user_id:token\titem_id:token\n" + "".join(f"1\t{item}\n" for item in range(4)))
    with pytest.raises(DataError, match="leave nothing to train on"):
        Choices(str(path), validation=0.5, test=0.5)
    with pytest.raises(DataError, match="chose every item"):
        Choices(str(path), validation=0.0, test=0.0)
    with pytest.raises(DataError, match="'tset' is unknown; did you mean 'test'"):
        Candidates(str(path), "tset")
