"""DeepSpeed's JSON, generated from the run's YAML: one source of truth, and every contradiction told with both places.

``strategy.zero.extra`` and the file of ``strategy.zero.file`` are merged in. What follows from other keys of the YAML may be
repeated there with the same value, or as ``auto``; another value is refused. So is what would change the result behind the
run's back, and what nobody would read: DeepSpeed itself ignores unknown keys. Imports no torch.
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
    ("amp",): "the YAML's precision says it: bf16 or fp16",
    ("torch_autocast",): "the YAML's precision says it: bf16 or fp16",
    ("managed_gradient_accumulation",): "the run says itself where a window ends; leave it out",
    ("data_types",): "gradients are accumulated by rules of Lockstep's own; leave it out",
    ("checkpoint",): "checkpoints are Lockstep's, without pickle; leave it out",
    ("elasticity",): "any number of processes gives the same answer already; leave it out",
    ("tensorboard",): "the YAML's reporting says what is reported where",
    ("wandb",): "the YAML's reporting says what is reported where",
    ("csv_monitor",): "the YAML's reporting says what is reported where",
    ("activation_checkpointing",): "it is read by models of DeepSpeed's own only",
    ("zero_optimization", "zero_quantized_gradients"): "rounds gradients, so the answer would depend on the processes",
    ("zero_optimization", "zero_quantized_weights"): "rounds weights, so the answer would depend on the processes",
    ("zero_optimization", "compute_grad_norm"): "the norm tells whether a gradient is finite; leave it out",
}


class FollowsKey(NamedTuple):
    """A value of DeepSpeed's JSON that another key of the YAML says."""

    value: Any
    key: str


class WrittenValues(NamedTuple):
    """Values for DeepSpeed's JSON that the user wrote, and where.

    Args:
        key: of the YAML, to which the values belong.
        where: returns file and line of a path within the values.
    """

    values: Mapping[str, Any]
    key: str
    where: Callable[[KeyPath], str]


def generate(values: RunConfiguration, beside: Callable[[str], Path]) -> dict[str, Any]:
    """Return DeepSpeed's JSON for a run that was found to contradict nothing.

    A microbatch and an accumulation of 1 leave all division to Lockstep.

    Args:
        beside: returns a path relative to the YAML.

    Raises:
        ConfigurationError: ``strategy.zero.file`` can no longer be read.
    """
    sources, problems = read_sources(values, lambda path: "configuration", beside)
    if problems:
        raise ConfigurationError(problems)
    generated = _merged(sources)
    generated.pop("optimizer", None)  # the YAML's is handed over as an object
    for path, (value, _) in _following(values).items():
        _set(generated, path, value)
    return _without_auto(generated)


def _merged(sources: list[WrittenValues]) -> dict[str, Any]:
    """Merge what the user wrote; a later source has the last word."""
    merged: dict[str, Any] = {}
    for source in sources:
        for path, value in _leaves(source.values):
            _set(merged, path, value)
    return merged


def read_sources(
    values: RunConfiguration, where: Callable[[KeyPath], str], beside: Callable[[str], Path]
) -> tuple[list[WrittenValues], list[Problem]]:
    """Return the file's values and then those of ``extra``, and what is wrong with the file itself.

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
        json.loads(path.read_text(encoding="utf-8"))  # YAML would take more than JSON does
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
    """Return all that the user's own JSON says against the YAML, against itself, or to nobody.

    Args:
        where: returns file and line of a key of the YAML, for the other place of a contradiction.
    """
    problems = []
    first: dict[KeyPath, tuple[Any, str]] = {}
    for source in sources:
        for path, value in _leaves(source.values):
            what = _wrong(values, path, value, where) or _said_before(first.get(path), value)
            if what is not None:
                problems.append(Problem(source.where(path), ".".join(filter(None, [source.key, *path])), what))
            first.setdefault(path, (value, source.where(path)))
    return problems


def _wrong(values: RunConfiguration, path: KeyPath, value: Any, where: Callable[[KeyPath], str]) -> str | None:
    for refused, why in _REFUSED.items():
        if path[: len(refused)] == refused:
            return why
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
    return f"{value!r} contradicts {there}, from which {expected.value!r} follows; leave it out, or write auto"


def _wrong_optimizer(
    values: RunConfiguration, path: KeyPath, value: Any, where: Callable[[KeyPath], str]
) -> str | None:
    """The optimizer is the YAML's; a file made for other trainers may repeat it."""
    ours, target = values.optimizer.args, values.optimizer.target
    if path == ("optimizer", "type"):
        there = f"{where(('optimizer', 'target'))} optimizer.target"
        return None if value in (AUTO, target) else f"{value!r} contradicts {there}: {target!r}"
    if len(path) != 3 or path[1] != "params":
        return "is not read: the optimizer is the YAML's"
    if value == AUTO or (path[2] in ours and _equal(ours[path[2]], value)):
        return None
    there = f"{where(('optimizer', 'args', path[2]))} optimizer.args"
    said = repr(ours[path[2]]) if path[2] in ours else "nothing"
    return f"{value!r} contradicts {there}, which says {said}; write auto"


def _said_before(before: tuple[Any, str] | None, value: Any) -> str | None:
    if before is None or AUTO in (before[0], value) or _equal(before[0], value):
        return None
    return f"{value!r} contradicts {before[1]}, which says {before[0]!r}"


def _following(values: RunConfiguration) -> dict[KeyPath, FollowsKey]:
    """Return what Lockstep tells DeepSpeed, whatever else is written."""
    zero, precision = values.strategy.zero, values.precision
    following = {
        ("train_micro_batch_size_per_gpu",): FollowsKey(1, "batch.micro_size"),
        ("gradient_accumulation_steps",): FollowsKey(1, "batch.slots"),
        ("gradient_clipping",): FollowsKey(values.optimizer.max_grad_norm or 0.0, "optimizer.max_grad_norm"),
        ("steps_per_print",): FollowsKey(2**31, "reporting.every"),
        ("zero_allow_untested_optimizer",): FollowsKey(True, "optimizer.target"),
        ("zero_force_ds_cpu_optimizer",): FollowsKey(
            False, "optimizer.target"
        ),  # torch's own, so that the answer is ddp's
        ("bf16", "enabled"): FollowsKey(precision == "bf16", "precision"),
        ("fp16", "enabled"): FollowsKey(precision == "fp16", "precision"),
        ("zero_optimization", "stage"): FollowsKey(zero.stage, "strategy.zero.stage"),
    }
    if sums_gradients(values):
        following["gradient_allreduce_op",] = FollowsKey("sum", "precision")
    for name, key in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        offload: OffloadSection | None = getattr(zero, key)
        for part, value in _offloaded(offload).items():
            following["zero_optimization", name, part] = FollowsKey(value, f"strategy.zero.{key}")
    return following


def sums_gradients(values: RunConfiguration) -> bool:
    """Tell whether DeepSpeed sums gradients over the ranks; stage 3 can only average them (0.19).

    Where it averages, the loss is multiplied by the number of processes, which in half precision is part of what is rounded.
    """
    return values.precision != "fp32" and values.strategy.zero.stage < 3


def _accepted(values: RunConfiguration) -> dict[KeyPath, FollowsKey]:
    """Return what a user may write where it follows from other keys: sizes mean the YAML's, not those told DeepSpeed."""
    batch = values.batch
    slots = batch.slots or -(-batch.global_size // batch.largest_slot)
    ranks = values.strategy.world_size
    accepted = {
        **_following(values),
        ("train_batch_size",): FollowsKey(batch.global_size, "batch.global_size"),
        ("train_micro_batch_size_per_gpu",): FollowsKey(batch.largest_slot, "batch.micro_size"),
    }
    del accepted["gradient_accumulation_steps",]
    if ranks is not None:
        accepted["gradient_accumulation_steps",] = FollowsKey(-(-slots // ranks), "batch")
    for name, key in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        if getattr(values.strategy.zero, key) is None:
            accepted["zero_optimization", name, "device"] = FollowsKey("none", f"strategy.zero.{key}")
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
    """Leave out what says ``auto`` and follows from no key of the YAML: DeepSpeed's own default then holds."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value for key, value in tree.items() if value != AUTO
    }


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return list(first) == list(second)
    return bool(first == second)
