"""Generates DeepSpeed's JSON from the run's YAML, and reports every contradiction with both locations.

``strategy.zero.extra`` and the file of ``strategy.zero.file`` are merged in. They may repeat a value that the YAML determines,
or set it to ``auto``; another value is refused. So are settings that would silently change the result, and unknown keys, which
DeepSpeed ignores. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from runtime.config.sections import RunConfiguration
from runtime.config.yaml_file import Lines, read_file
from runtime.config.zero import OffloadSection
from runtime.errors import ConfigurationError, Problem
from runtime.wording import did_you_mean

KeyPath = tuple[str, ...]

AUTO = "auto"
_EXTRA = ("strategy", "zero", "extra")
_FILE = ("strategy", "zero", "file")

_PASSED_ON = frozenset({
    "aio", "bf16", "comms_logger", "communication_data_type", "dump_state", "fp16", "gradient_accumulation_steps",
    "gradient_clipping", "memory_breakdown", "optimizer", "steps_per_print", "train_batch_size",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
})  # fmt: skip
_OF_ZERO = frozenset({
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "enable_sanity_checks",
    "ignore_unused_parameters", "load_from_fp32_weights", "log_trace_cache_warnings", "memory_efficient_linear",
    "offload_optimizer", "offload_param", "overlap_comm", "parameter_alignment", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "stage", "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params", "sub_group_size", "use_multi_rank_bucket_allreduce",
})  # fmt: skip
_REFUSED: dict[KeyPath, str] = {
    ("scheduler",): "the learning rate follows the YAML's schedule; leave it out",
    ("prescale_gradients",): "the global batch's gradient is a sum, divided once by its weight; leave it out",
    ("gradient_predivide_factor",): "the global batch's gradient is a sum, divided once by its weight; leave it out",
    ("amp",): "is set by the YAML's precision: bf16 or fp16; leave it out",
    ("torch_autocast",): "is set by the YAML's precision: bf16 or fp16; leave it out",
    ("managed_gradient_accumulation",): "Lockstep determines where a window ends; leave it out",
    ("data_types",): "Lockstep determines how gradients are accumulated; leave it out",
    ("checkpoint",): "checkpoints are Lockstep's, without pickle; leave it out",
    ("elasticity",): "any number of processes gives the same result already; leave it out",
    ("tensorboard",): "is replaced by the YAML's reporting; leave it out",
    ("wandb",): "is replaced by the YAML's reporting; leave it out",
    ("csv_monitor",): "is replaced by the YAML's reporting; leave it out",
    ("activation_checkpointing",): "is read only by DeepSpeed's own models; use model.checkpoint_activations",
    ("zero_optimization", "zero_quantized_gradients"): "rounds gradients, so the result would depend on the processes",
    ("zero_optimization", "zero_quantized_weights"): "rounds weights, so the result would depend on the processes",
    ("zero_optimization", "compute_grad_norm"): "the norm is needed to detect non-finite gradients; leave it out",
}


class DerivedValue(NamedTuple):
    """A value of DeepSpeed's JSON that is determined by a key of the YAML."""

    value: Any
    key: str


class WrittenValues(NamedTuple):
    """Values for DeepSpeed's JSON written by the user, with their locations.

    Args:
        key: of the YAML that contains the values; empty for a file.
        where: returns file and line of a path within the values.
    """

    values: Mapping[str, Any]
    key: str
    where: Callable[[KeyPath], str]


def generate(values: RunConfiguration, beside: Callable[[str], Path]) -> dict[str, Any]:
    """Return DeepSpeed's JSON for a run whose configuration was checked for contradictions.

    With a micro-batch size and accumulation steps of 1, DeepSpeed divides nothing.

    Args:
        beside: returns a path relative to the YAML.

    Raises:
        ConfigurationError: ``strategy.zero.file`` can no longer be read.
    """
    sources, problems = read_sources(values, lambda path: "configuration", beside)
    if problems:
        raise ConfigurationError(problems)
    generated = _merged(sources)
    generated.pop("optimizer", None)  # the YAML's is passed as an object
    for path, (value, _) in _derived(values).items():
        _set(generated, path, value)
    return _without_auto(generated)


def _merged(sources: list[WrittenValues]) -> dict[str, Any]:
    """Merge the user's values; later sources take precedence."""
    merged: dict[str, Any] = {}
    for source in sources:
        for path, value in _leaves(source.values):
            _set(merged, path, value)
    return merged


def read_sources(
    values: RunConfiguration, where: Callable[[KeyPath], str], beside: Callable[[str], Path]
) -> tuple[list[WrittenValues], list[Problem]]:
    """Return the values of the file, then those of ``extra``, and problems with the file itself.

    Args:
        where: returns file and line of a key of the YAML.
        beside: returns a path relative to the YAML.
    """
    zero = values.strategy.zero
    extra = WrittenValues(zero.extra, ".".join(_EXTRA), lambda path: where((*_EXTRA, *path)))
    if zero.file is None:
        return [extra], []
    path, lines = beside(zero.file), Lines()
    try:
        json.loads(path.read_text(encoding="utf-8"))  # read_file accepts YAML that is not JSON
        content, problems = read_file(path, lines)
    except OSError as error:
        return [extra], [Problem(where(_FILE), ".".join(_FILE), f"{path} cannot be read: {error.strerror}")]
    except ConfigurationError as error:
        return [extra], error.problems
    except ValueError as error:
        return [extra], [Problem(str(path), "", f"is not JSON: {error}")]
    return [WrittenValues(content, "", lambda path: lines[path] if path in lines else lines[()]), extra], problems


def contradictions(
    values: RunConfiguration, sources: list[WrittenValues], where: Callable[[KeyPath], str]
) -> list[Problem]:
    """Return a problem for each user value that contradicts the YAML or another one, is refused, or is not read.

    Args:
        where: returns file and line of a key of the YAML, for the other side of a contradiction.
    """
    problems = []
    first: dict[KeyPath, tuple[Any, str]] = {}
    for source in sources:
        for path, value in _leaves(source.values):
            what = _wrong(values, path, value, where) or _contradicts_earlier(first.get(path), value)
            if what is not None:
                problems.append(Problem(source.where(path), ".".join(filter(None, [source.key, *path])), what))
            first.setdefault(path, (value, source.where(path)))
    return problems


def _wrong(values: RunConfiguration, path: KeyPath, value: Any, where: Callable[[KeyPath], str]) -> str | None:
    for refused, reason in _REFUSED.items():
        if path[: len(refused)] == refused:
            return reason
    if path[0] not in _PASSED_ON:
        return f"is not passed on to DeepSpeed{did_you_mean(path[0], _PASSED_ON)}"
    if path[0] == "zero_optimization" and len(path) > 1 and path[1] not in _OF_ZERO:
        return f"is not passed on to DeepSpeed{did_you_mean(path[1], _OF_ZERO)}"
    if path[0] == "optimizer":
        return _wrong_optimizer(values, path, value, where)
    if value == AUTO:
        return None
    expected = _accepted(values).get(path)
    if expected is None or _equal(expected.value, value):
        return None
    there = f"{where(tuple(expected.key.split('.')))} {expected.key}"
    return f"{value!r} contradicts {there}, which requires {expected.value!r}; leave it out, or write auto"


def _wrong_optimizer(
    values: RunConfiguration, path: KeyPath, value: Any, where: Callable[[KeyPath], str]
) -> str | None:
    """Refuse another optimizer than the YAML's; a file made for other trainers may repeat it."""
    args, target = values.optimizer.args, values.optimizer.target
    if path == ("optimizer", "type"):
        there = f"{where(('optimizer', 'target'))} optimizer.target"
        return None if value in (AUTO, target) else f"{value!r} contradicts {there}: {target!r}"
    if len(path) != 3 or path[1] != "params":
        return "is not read: the optimizer is the YAML's"
    if value == AUTO or (path[2] in args and _equal(args[path[2]], value)):
        return None
    there = f"{where(('optimizer', 'args', path[2]))} optimizer.args"
    in_yaml = f"has {args[path[2]]!r}" if path[2] in args else "does not set it"
    return f"{value!r} contradicts {there}, which {in_yaml}; write auto"


def _contradicts_earlier(before: tuple[Any, str] | None, value: Any) -> str | None:
    if before is None or AUTO in (before[0], value) or _equal(before[0], value):
        return None
    return f"{value!r} contradicts {before[1]}, which has {before[0]!r}"


def _derived(values: RunConfiguration) -> dict[KeyPath, DerivedValue]:
    """Return the values that Lockstep always sets for DeepSpeed."""
    zero, precision = values.strategy.zero, values.precision
    derived = {
        ("train_micro_batch_size_per_gpu",): DerivedValue(1, "batch.micro_size"),
        ("gradient_accumulation_steps",): DerivedValue(1, "batch.slots"),
        ("gradient_clipping",): DerivedValue(values.optimizer.max_grad_norm or 0.0, "optimizer.max_grad_norm"),
        ("steps_per_print",): DerivedValue(2**31, "reporting.every"),
        ("zero_allow_untested_optimizer",): DerivedValue(True, "optimizer.target"),
        # torch's own optimizer, so that the result is ddp's
        ("zero_force_ds_cpu_optimizer",): DerivedValue(False, "optimizer.target"),
        ("bf16", "enabled"): DerivedValue(precision == "bf16", "precision"),
        ("fp16", "enabled"): DerivedValue(precision == "fp16", "precision"),
        ("zero_optimization", "stage"): DerivedValue(zero.stage, "strategy.zero.stage"),
    }
    if sums_gradients(values):
        derived["gradient_allreduce_op",] = DerivedValue("sum", "precision")
    for name, key in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        offload: OffloadSection | None = getattr(zero, key)
        for part, value in _offloaded(offload).items():
            derived["zero_optimization", name, part] = DerivedValue(value, f"strategy.zero.{key}")
    return derived


def sums_gradients(values: RunConfiguration) -> bool:
    """Return whether DeepSpeed sums gradients over the ranks; stage 3 can only average them (0.19).

    If it averages, the loss is multiplied by the number of processes, which in half precision affects rounding.
    """
    return values.precision != "fp32" and values.strategy.zero.stage < 3


def _accepted(values: RunConfiguration) -> dict[KeyPath, DerivedValue]:
    """Return the values that a user may repeat: the YAML's sizes, rather than those that Lockstep sets for DeepSpeed."""
    batch = values.batch
    slots = batch.slots or -(-batch.global_size // batch.largest_slot)
    ranks = values.strategy.world_size
    accepted = {
        **_derived(values),
        ("train_batch_size",): DerivedValue(batch.global_size, "batch.global_size"),
        ("train_micro_batch_size_per_gpu",): DerivedValue(batch.largest_slot, "batch.micro_size"),
    }
    del accepted["gradient_accumulation_steps",]
    if ranks is not None:
        accepted["gradient_accumulation_steps",] = DerivedValue(-(-slots // ranks), "batch")
    for name, key in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        if getattr(values.strategy.zero, key) is None:
            accepted["zero_optimization", name, "device"] = DerivedValue("none", f"strategy.zero.{key}")
    return accepted


def _offloaded(offload: OffloadSection | None) -> dict[str, Any]:
    if offload is None:
        return {}
    place = {"nvme_path": offload.path} if offload.device == "nvme" else {"pin_memory": offload.pin_memory}
    return {"device": offload.device, **place}


def _leaves(values: Mapping[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _set(tree: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[path[-1]] = value


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    """Remove values of ``auto`` that no key of the YAML determines: DeepSpeed then uses its default."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value for key, value in tree.items() if value != AUTO
    }


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return list(first) == list(second)
    return bool(first == second)
