"""What a model or an objective raises is one message with the user's own line, in training, evaluation and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.commands.dry_run import show
from runtime.config.file import load
from runtime.errors import ForwardError
from runtime.session import evaluate, predict, train
from tests.observed import PROJECT, configuration

pytestmark = pytest.mark.single

MISFITS = str(Path(PROJECT) / "tiny_misfits.py")


def line_of(words: str) -> int:
    lines = Path(MISFITS).read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if words in line)


def raising(kind: str) -> dict[str, Any]:
    return {"target": "tiny_misfits:Raising", "args": {"kind": kind}}


MISTAKES: list[Any] = [
    (
        {"model": "tiny_misfits:Narrow"},
        ["mat1 and mat2 shapes cannot be multiplied", "layers.1: Linear(in_features=17", "model.args"],
        "# the line that is told",
    ),
    ({"model": {"target": "tiny_misfits:Narrow", "args": {"dtype": "float32"}}}, ["parameters are float32"], "# the line"),
    ({"objective": "tiny_misfits:Broken"}, ["must match the size"], "# shapes that"),
    ({"model": {"target": "MLP", "args": {"in_features": 9, "hidden": [4], "out_features": 3}}}, ["model_zoo/mlp.py"], None),
    ({"model": {"target": "torch.nn:Linear", "args": {"in_features": 9, "out_features": 3}}}, ["Linear(in_features=9"], None),
    ({"model": "tiny_misfits:Wordy"}, ["missing 1 required positional argument: 'mask'", "data.fields.inputs"], None),
    ({"model": raising("attribute")}, ["no attribute 'skip_connection'"], "# a missing attribute"),
    ({"model": raising("file")}, ["FileNotFoundError", "weights.bin"], "# a missing file"),
    ({"model": raising("connection")}, ["a connection of another size"], "# about a connection"),
    ({"model": raising("numbers")}, ["an Embedding takes whole numbers", "words: Embedding"], "# numbers for words"),
    ({"model": raising("words")}, ["0 to num_embeddings - 1", "words: Embedding"], "# words beyond"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words", "told"), MISTAKES)
@pytest.mark.parametrize("checks", ["on", "off"])
def test_a_forward_pass_that_raises_is_told_with_the_users_line(
    tmp_path: Path, changes: dict[str, Any], words: list[str], told: str | None, checks: str
) -> None:
    with pytest.raises(ForwardError) as caught:
        train(configuration(tmp_path / "run", **changes, checks=checks))
    message = str(caught.value)
    for word in words:
        assert word in message
    if told is not None:
        assert f"{MISFITS}:{line_of(told)} in forward" in message
    assert "float64" in message
    assert len(message.splitlines()) <= 5


def test_evaluation_and_prediction_tell_it_too(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", limit={"steps": 1})
    train(config)
    wide = {"target": "tiny_tables:wide"}
    (tmp_path / "tiny_tables.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n\n"
        "def wide():\n    return TensorDataset(torch.zeros(4, 9).double(), torch.zeros(4).long())\n"
    )
    other = {**config, "code": str(tmp_path), "model": {"target": "tests.project.tiny:Mlp"}}
    other["data"] = {"train": {"target": "tests.project.tiny:points"}, "validation": wide}
    for act in (lambda: evaluate(other), lambda: predict(other, split="validation", output=tmp_path / "out.csv")):
        with pytest.raises(ForwardError, match=r"mat1 and mat2 shapes cannot be multiplied \(4x9"):
            act()


def test_show_prints_the_shapes_and_types_of_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(load(configuration(tmp_path / "run")), 1)
    told = capsys.readouterr().out
    assert "(1, 8) float64, (1,) int64" in told
    assert "warnings" not in told


def test_show_says_that_the_model_does_not_take_a_sample_and_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(load(configuration(tmp_path / "run", model="tiny_misfits:Narrow")), 1)
    told = " ".join(capsys.readouterr().out.split())
    assert "(1, 8) float64, (1,) int64" in told
    assert "the forward pass raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x16 and 17x3)" in told
