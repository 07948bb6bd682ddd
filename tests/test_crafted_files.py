"""Files that somebody made by hand, with the right checksums: one message or the checkpoint before, and never a traceback."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import json_files
from runtime.checkpoints.load import damage_of
from runtime.cli import main
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool

pytestmark = pytest.mark.single
DEEP = "[" * 100_000 + "]" * 100_000
LESS_DEEP = "[" * 900 + "]" * 900  # which Python's parser reads and its recursion does not


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        tree = json.loads(text)
        change(tree)
        return json.dumps(tree)

    return edit


CRAFTED: dict[str, tuple[str, Callable[[str], str]]] = {
    "a deep state": ("state.json", lambda text: DEEP),
    "a deep part of the state": (
        "state.json",
        lambda text: text.replace('"results": {', f'"results": {{"x": {LESS_DEEP}, ', 1),
    ),
    "a deep manifest": ("manifest.json", lambda text: DEEP),
    "a list": ("state.json", lambda text: "[]"),
    "an infinite epoch": ("state.json", edited(lambda tree: tree.update(epoch=float("inf")))),
    "a huge number": ("state.json", lambda text: text.replace('"epoch": 1', f'"epoch": {"9" * 5000}')),
    "a key twice": ("state.json", lambda text: text.replace("{", '{"step": 1, "step": 2, ', 1)),
    "results of another type": ("state.json", edited(lambda tree: tree.update(results=3))),
    "a tensor that is not there": ("state.json", edited(lambda tree: tree["model"].update(x={"$tensor": "nowhere"}))),
    "strides that are none": (
        "state.json",
        edited(lambda tree: tree["model"]["net.0.weight"].update(strides=[0, 10**15])),
    ),
    "a model of another type": ("state.json", edited(lambda tree: tree.update(model=[1, 2]))),
    "a header of absurd shapes": ("model.safetensors", lambda text: "\x10" + "\0" * 7 + '{"a": [[[[[[[[[['),
    "a file outside": (
        "manifest.json",
        edited(lambda tree: tree["files"].update({"../x": {"bytes": 0, "sha256": ""}})),
    ),
}


@pytest.fixture(scope="module")
def trained(pool: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crafted") / "run"
    config = configuration(folder, limit={"steps": 2}, checkpoint={"every": "1 step", "keep": 2})
    pool.run(observe, 1, config)
    return folder


def craft(run: Path, file: str, change: Callable[[str], str], *, signed: bool = True) -> Path:
    """Change a file of the newest checkpoint and sign the manifest anew."""
    checkpoint = max((run / "checkpoints").glob("step-*"))
    path = checkpoint / file
    before = path.read_text(errors="replace")
    path.write_text(change(before))
    if file != "manifest.json" and signed:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        content = path.read_bytes()
        manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return checkpoint


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_checkpoint_is_damaged_to_every_command(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    checkpoint = craft(run, *CRAFTED[kind])
    assert damage_of(checkpoint) is not None
    assert main(["checkpoints", str(run)]) == 1
    assert "is damaged" in capsys.readouterr().out
    assert main(["export", str(checkpoint), str(tmp_path / "x.safetensors")]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "before.safetensors")]) == 0  # the one before


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["progress"].update(step="2"),
        lambda t: t["progress"].update(cursor=["x", 0]),
        lambda t: t["identity"].update(more=1),
        lambda t: t["identity"].update(slots=-4),
        lambda t: t.update(optimizer=[]),
        lambda t: t.update(optimizer={"param_groups": 3, "state": []}),
        lambda t: t.pop("progress"),
    ],
)
def test_a_crafted_training_state_ends_a_start_with_one_message(
    pool: ProcessPool, trained: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    craft(run, "state.json", edited(lambda tree: change(tree["training"])))
    told = pool.run(message_of, 1, configuration(run, limit={"steps": 3}))[0]
    assert told.startswith("CheckpointError: ")


def message_of(config: dict[str, Any]) -> str:
    from runtime.errors import LockstepError
    from runtime.session import train

    try:
        train(config)
    except LockstepError as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


@pytest.mark.parametrize(
    "content", [DEEP, LESS_DEEP, "[]", "3", '{"rollbacks": 3}', '{"rollbacks": [{"skipped": [["a"]]}]}']
)
def test_a_crafted_record_of_rollbacks_is_one_message(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "checkpoints" / "rollbacks.json").write_text(content)
    assert main(["checkpoints", str(run)]) == 1
    assert "rollbacks.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", [DEEP, "[]\n", "3\n", '{"step": [], "step": {}}\n', '{"step": 1e999}\n'])
def test_crafted_records_end_nothing(pool: ProcessPool, trained: Path, tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for file in ("metrics.jsonl", "checkpoints/best.json", "outcome.json"):
        (run / file).write_text(content)
    assert pool.run(message_of, 1, configuration(run, limit={"steps": 3}))[0] == "finished"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # PyYAML 6.0.4 says it in other words.
        ("model: " + "[" * 5000 + "]" * 5000, "nest"),
        ("model: " + "{a: " * 5000 + "}" * 5000, "nest"),
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
            "aliases expand to",
        ),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)),
            "nested deeper than 100 levels",
        ),
    ],
)
def test_a_yaml_bomb_is_one_message_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert main(["show", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert f"{tmp_path / 'c.yaml'}:" in error


@pytest.mark.parametrize("text", [DEEP, LESS_DEEP, '{"a": 1, "a": 2}', "{", "9" * 5000])
def test_json_that_is_not_ours_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        json_files.parse(text)
