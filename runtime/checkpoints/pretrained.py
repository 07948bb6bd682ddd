"""Load pretrained weights: a safetensors file, a torch file (tensors only, never unpickled code), or a checkpoint."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime import json_files
from runtime.checkpoints.load import damage_of, load_model
from runtime.checkpoints.sharded_files import INDEX
from runtime.config.component import ComponentError
from runtime.config.learning import WeightsSection
from runtime.optimization.patterns import described_misses, matches, unmatched
from runtime.run_files import RunFiles
from runtime.state.durable_files import checksum
from runtime.wording import did_you_mean

_SAFETENSORS = ".safetensors"
_INDEX = ".safetensors.index.json"
_LISTED = 12  # names listed of each kind; a wrong file misses hundreds


@dataclass
class WeightsReport:
    """Which names of a file and of a model were loaded.

    Args:
        file: the file read.
        loaded: names that were loaded.
        left_out: names of the model that match ``ignore``; they keep their initial values.
        missing: names of the model that are not in the file; they keep their initial values.
        unexpected: names of the file (renamed) that the model does not have; they are not used.
        misshaped: names with the file's and the model's shape, if these differ.
    """

    file: Path
    loaded: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a table: the number of names of each kind, and which."""
        rows = [
            ("missing, keep their initial values", self.missing),
            ("matched by ignore, keep their initial values", self.left_out),
            ("unexpected, not used", self.unexpected),
        ]
        first = f"weights of {self.file}: {len(self.loaded)} of {self._num_names} names loaded"
        return "\n".join([first, *(f"  {len(names):>4} {what}: {_listed(names)}" for what, names in rows if names)])

    @property
    def _num_names(self) -> int:
        return len(self.loaded) + len(self.missing) + len(self.left_out)


def load_weights(model: nn.Module, section: WeightsSection, file: Path) -> WeightsReport:
    """Load weights into a newly built model, on the CPU; values are cast to the model's dtypes.

    Args:
        section: how the file's names map to the model's.
        file: a safetensors or torch file; or a folder with ``model.safetensors``, such as a checkpoint.

    Raises:
        ComponentError: there is no such file, or it is damaged, is not a state dict, or does not fit.
    """
    weights = _renamed(_read(file, section), section)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if section.ignore:
        unused = unmatched(section.ignore, {**state, **weights})
        if unused:
            raise ComponentError(f"no name matches {described_misses(unused, state)}", ("ignore",))
    report = WeightsReport(file)
    fitting: dict[str, Tensor] = {}
    for name, value in weights.items():
        if matches(name, section.ignore):
            continue
        if name not in state:
            report.unexpected.append(name)
        elif state[name].shape != value.shape:
            report.misshaped[name] = (tuple(value.shape), tuple(state[name].shape))
        else:
            fitting[name] = value
    covered = {state[name].data_ptr() for name in fitting if state[name].numel()}  # a tied weight has several names
    for name, value in state.items():
        if name in fitting or (value.numel() and value.data_ptr() in covered):
            report.loaded.append(name)
        elif matches(name, section.ignore):
            report.left_out.append(name)
        elif name not in report.misshaped:
            report.missing.append(name)
    _check_fit(report, weights, state)
    model.load_state_dict(fitting, strict=False)
    return report


def weights_digest(file: Path) -> str | None:
    """Return a digest of the files that :func:`load_weights` reads, or None if they do not exist."""
    try:
        digests = [checksum(part) for part in _files(file)]
        return (digests[0] if len(digests) == 1 else sha256("".join(digests).encode()).hexdigest())[:16]
    except (OSError, ComponentError):
        return None


def _files(file: Path) -> list[Path]:
    if (file / INDEX).is_file():
        return [file / "manifest.json"]  # holds the digests of all shards
    if file.is_dir():
        single = file / f"model{_SAFETENSORS}"
        return _files(single if single.is_file() else file / f"model{_INDEX}")
    if file.name.endswith(_INDEX):
        return [file, *(file.parent / part for part in sorted(set(_parts(file).values())))]
    return [file]


def _check_fit(report: WeightsReport, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    if report.misshaped:
        shapes = [
            f"{name} has shape {_shape(in_file)}, in the model {_shape(in_model)}"
            for name, (in_file, in_model) in report.misshaped.items()
        ]
        raise ComponentError(
            f"{report.file}: {_listed(shapes, '; ')}. To keep the model's initial values, as for a new head, list the names in "
            f"model.weights.ignore: {json.dumps(list(report.misshaped)[:_LISTED])}",
            ("ignore",),
        )
    if not report.loaded:
        raise ComponentError(
            f"{report.file} has none of the model's names{_renaming_hint(weights, state)}. It has {_listed(list(weights))}; "
            f"the model {_listed(list(state))}"
        )


def _renaming_hint(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Suggest the ``prefix`` or ``strip`` that would make the names fit, if there is one."""
    for in_file in weights:
        for in_model in state:
            if in_file.endswith(f".{in_model}"):
                return f"; did you mean strip: {in_file.removesuffix(in_model)}?"
            if in_model.endswith(f".{in_file}"):
                return f"; did you mean prefix: {in_model.removesuffix(in_file)}?"
    return did_you_mean(next(iter(weights), ""), state)


def _renamed(weights: Mapping[str, Tensor], section: WeightsSection) -> dict[str, Tensor]:
    strip = section.strip or ""
    if strip and not any(name.startswith(strip) for name in weights):
        raise ComponentError(f"no name in the file begins with {strip!r}: it has {_listed(list(weights))}", ("strip",))
    # Names without the stripped prefix are kept, and are most likely unexpected.
    return {(section.prefix or "") + name.removeprefix(strip): value for name, value in weights.items()}


def _read(file: Path, section: WeightsSection) -> dict[str, Tensor]:
    if file.is_dir():
        return _of_folder(file, section)
    if not file.is_file():
        near = did_you_mean(file.name, [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else [])
        cure = f"; to get it: {section.provided_by}" if section.provided_by else ""
        raise ComponentError(f"there is no file {file}{near}{cure}", ("file",))
    if file.name.endswith(_INDEX):
        return _tensors(_of_parts(file), file, section)
    return _tensors(_content(file), file, section)


def _of_parts(index: Path) -> dict[str, Any]:
    """Read weights from several safetensors files with a Hugging Face index: ``weight_map`` of name to file."""
    parts = _parts(index)
    content: dict[str, Any] = {}
    for part in sorted(set(parts.values())):
        if not (index.parent / part).is_file():
            raise ComponentError(f"{index} names {part}, which is not in the same folder", ("file",))
        content |= _content(index.parent / part)
    missing = sorted(set(parts) - set(content))
    if missing:
        raise ComponentError(f"{index} names tensors that its files do not hold: {_listed(missing)}", ("file",))
    return content


def _parts(index: Path) -> dict[str, str]:
    try:
        parts = json_files.read(index)["weight_map"]
        return {str(name): Path(part).name for name, part in parts.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ComponentError(f"{index} is not an index of safetensors files: no weight_map", ("file",)) from error


def _content(file: Path) -> Any:
    try:
        return (
            load_file(file) if file.suffix == _SAFETENSORS else torch.load(file, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise ComponentError(
            f"{file} is not a torch file, or holds more than tensors and plain data: it is not read, since loading could run "
            "code. Save only the state dict (torch.save(model.state_dict(), …), or safetensors)",
            ("file",),
        ) from error
    except Exception as error:  # damaged files raise many kinds of errors in torch
        first_line = (str(error) or type(error).__name__).split("\n", maxsplit=1)[0]
        raise ComponentError(f"{file} cannot be read: {first_line}", ("file",)) from error


def _of_folder(folder: Path, section: WeightsSection) -> dict[str, Tensor]:
    file = folder / f"model{_SAFETENSORS}"
    if not file.is_file() and (folder / f"model{_INDEX}").is_file():
        return _read(folder / f"model{_INDEX}", section)
    if not file.is_file() and not (folder / INDEX).is_file():
        hint = "; give one of its checkpoints" if RunFiles(folder).checkpoints.is_dir() else ""
        raise ComponentError(f"{folder} is a folder without {file.name}{hint}", ("file",))
    if not (folder / "manifest.json").is_file():
        return _read(file, section)
    damage = damage_of(folder)
    if damage is not None:
        raise ComponentError(f"the checkpoint {folder} is damaged ({damage})", ("file",))
    return _tensors(load_model(folder), file, section)


def _tensors(content: Any, file: Path, section: WeightsSection) -> dict[str, Tensor]:
    """Return the state dict in a file's content, at ``section.entry`` if set."""
    for part in section.entry.split(".") if section.entry else ():
        if not isinstance(content, Mapping) or part not in content:
            known = did_you_mean(part, map(str, content)) if isinstance(content, Mapping) else ""
            raise ComponentError(f"{file} has no entry {section.entry!r}{known}", ("entry",))
        content = content[part]
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
        inner = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
        if inner:
            raise ComponentError(
                f"{file} is not a state dict but has entries: set entry to one of {_listed(inner)}", ("entry",)
            )
    raise ComponentError(f"{file} holds a {type(content).__name__} without tensors, not a state dict", ("file",))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _listed(names: Sequence[str], between: str = ", ") -> str:
    more = len(names) - _LISTED
    return between.join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
