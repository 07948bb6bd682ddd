"""The table of what ``accelerate launch`` and the environment can say beside the YAML: setting, our key, how it is read.

The launcher sets most variables whether or not the user asked for anything: a value that is the launcher's own default is no
setting. What becomes of the settings is ``launcher.py``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Variables = Mapping[str, str]

ACCUMULATION = "batch.micro_size"
"""The key that an accumulation of gradients becomes: microbatches of a size that makes so many of them."""


class NoKeyError(ValueError):
    """A setting that Lockstep has no key for; the message says what to do."""


@dataclass(frozen=True)
class LauncherSetting:
    """A setting of the launcher's and the key of the YAML that it stands for.

    Args:
        variable: in which the processes get it.
        option: of ``accelerate launch``, or the key of the file in which the user gave it.
        key: dotted path in the YAML.
        read: from the variable's text to the key's value; None where the launcher was told nothing.
        counts: whether it means anything, beside the others.
    """

    variable: str
    option: str
    key: str
    read: Callable[[str], Any]
    counts: Callable[[Variables], bool] = lambda variables: True


def _choice(known: Mapping[str, Any], otherwise: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text.lower() not in known:
            raise NoKeyError(otherwise)
        return known[text.lower()]

    return read


def _if_true(value: Any) -> Callable[[str], Any]:
    return lambda text: value if is_true(text) else None


def _number(convert: Callable[[str], float], *, least: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text.lower() in ("", "none", "auto"):
            return None
        try:
            value = convert(text)
        except ValueError:
            raise NoKeyError("is not a number") from None
        return value if value > least else None

    return read


def _unless(*defaults: str) -> Callable[[str], Any]:
    return lambda text: None if text.lower() in ("", "none", "auto", *defaults) else text


def is_true(text: str) -> bool:
    """Tell whether a variable's text means yes, as Accelerate reads it."""
    return text.lower() in ("1", "true", "yes", "y", "on", "t")


def _file(text: str) -> Any:
    return None if text.lower() in ("", "none") else str(Path(text).absolute())


def _classes(text: str) -> Any:
    return [name.strip() for name in text.split(",") if name.strip()] or None


def _reshards(text: str) -> Any:
    names = {"false": False, "shard_grad_op": False, "2": False, "true": None, "full_shard": None, "1": None}
    return _choice(
        names, "is a sharding that strategy.fsdp does not have; say strategy.fsdp.replicas for a hybrid one"
    )(text)


def _always(variables: Variables) -> bool:
    return True


def _with_fsdp(variables: Variables) -> bool:
    return is_true(variables.get(_FSDP, ""))


def _with_fsdp_by_size(variables: Variables) -> bool:
    return _with_fsdp(variables) and variables.get("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP"


def _with_zero(variables: Variables) -> bool:
    return is_true(variables.get(_ZERO, ""))


def _compiles(variables: Variables) -> bool:
    return variables.get(f"{_DYNAMO}BACKEND", "no").lower() not in ("", "no")


_FSDP, _ZERO = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_DYNAMO, _OFFLOADS = "ACCELERATE_DYNAMO_", {"none": None, "": None, "cpu": "cpu", "nvme": "nvme"}
_PRECISIONS = {"no": None, "": None, "fp32": None, "none": None, "bf16": "bf16", "fp16": "fp16"}

SETTINGS = (
    LauncherSetting(
        "ACCELERATE_MIXED_PRECISION",
        "--mixed_precision",
        "precision",
        _choice(_PRECISIONS, "is a precision that Lockstep does not have; take bf16 or fp16"),
    ),
    LauncherSetting(
        f"{_DYNAMO}BACKEND", "--dynamo_backend", "compile.backend", lambda t: (_unless("no")(t) or "").lower() or None
    ),
    LauncherSetting(f"{_DYNAMO}MODE", "--dynamo_mode", "compile.mode", _unless("default"), _compiles),
    LauncherSetting(
        f"{_DYNAMO}USE_FULLGRAPH", "--dynamo_use_fullgraph", "compile.fullgraph", _if_true(True), _compiles
    ),
    LauncherSetting(f"{_DYNAMO}USE_DYNAMIC", "--dynamo_use_dynamic", "compile.dynamic", _if_true(True), _compiles),
    LauncherSetting(_FSDP, "--use_fsdp", "strategy.kind", _if_true("fsdp")),
    LauncherSetting(
        "FSDP_RESHARD_AFTER_FORWARD",
        "--fsdp_reshard_after_forward",
        "strategy.fsdp.reshard_after_forward",
        _reshards,
        _with_fsdp,
    ),
    LauncherSetting(
        "FSDP_SHARDING_STRATEGY",
        "--fsdp_sharding_strategy",
        "strategy.fsdp.reshard_after_forward",
        _reshards,
        _with_fsdp,
    ),
    LauncherSetting(
        "FSDP_OFFLOAD_PARAMS", "--fsdp_offload_params", "strategy.fsdp.cpu_offload", _if_true(True), _with_fsdp
    ),
    LauncherSetting(
        "FSDP_TRANSFORMER_CLS_TO_WRAP",
        "--fsdp_transformer_layer_cls_to_wrap",
        "strategy.fsdp.wrap",
        _classes,
        _with_fsdp,
    ),
    LauncherSetting(
        "FSDP_MIN_NUM_PARAMS",
        "--fsdp_min_num_params",
        "strategy.fsdp.min_parameters",
        _number(int, least=0),
        _with_fsdp_by_size,
    ),
    LauncherSetting(_ZERO, "--use_deepspeed", "strategy.kind", _if_true("zero")),
    LauncherSetting(
        "ACCELERATE_DEEPSPEED_ZERO_STAGE", "--zero_stage", "strategy.zero.stage", _number(int, least=-1), _with_zero
    ),
    LauncherSetting(
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "--offload_optimizer_device",
        "strategy.zero.offload_optimizer",
        _choice(_OFFLOADS, "is a device that nothing is offloaded to; take cpu or nvme"),
        _with_zero,
    ),
    LauncherSetting(
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        "--offload_param_device",
        "strategy.zero.offload_parameters",
        _choice(_OFFLOADS, "is a device that nothing is offloaded to; take cpu or nvme"),
        _with_zero,
    ),
    LauncherSetting(
        "ACCELERATE_DEEPSPEED_CONFIG_FILE", "--deepspeed_config_file", "strategy.zero.file", _file, _with_zero
    ),
    LauncherSetting(
        "ACCELERATE_GRADIENT_CLIPPING", "--gradient_clipping", "optimizer.max_grad_norm", _number(float, least=0)
    ),
    LauncherSetting(
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "--gradient_accumulation_steps", ACCUMULATION, _number(int, least=1)
    ),
)

# What a run would otherwise be trained without, and no key stands for: variable, option, when it counts, what to do.
REFUSED: tuple[tuple[str, str, Callable[[Variables], bool], str], ...] = (
    (
        "ACCELERATE_USE_MEGATRON_LM",
        "--use_megatron_lm",
        _always,
        "Lockstep does not run Megatron-LM; take strategy.kind: fsdp or zero",
    ),
    (
        "ACCELERATE_USE_PARALLELISM_CONFIG",
        "--use_parallelism_config",
        _always,
        "Lockstep shards by strategy.kind: fsdp, in groups by strategy.fsdp.replicas, and splits no tensors or sequences",
    ),
    (
        f"{_DYNAMO}USE_REGIONAL_COMPILATION",
        "--dynamo_use_regional_compilation",
        _compiles,
        "leave it out, and name the classes of the blocks that are compiled one by one: compile.blocks",
    ),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        "--fsdp_activation_checkpointing",
        _with_fsdp,
        "leave it out, and name the classes of the blocks that are recomputed: model.checkpoint_activations",
    ),
    ("FSDP_IGNORED_MODULES", "--fsdp_ignored_modules", _with_fsdp, "strategy.fsdp shards all modules"),
    (
        "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
        "--deepspeed_moe_layer_cls_names",
        _with_zero,
        "strategy.zero shards no mixtures of experts",
    ),
    ("ACCELERATE_DOWNCAST_BF16", "--downcast_bf16", _always, "it is for TPUs, which Lockstep does not run on"),
)
# What changes no result here: variable, value, when it counts, what holds instead.
WITHOUT_EFFECT: tuple[tuple[str, str, Callable[[Variables], bool], str], ...] = (
    ("FSDP_VERSION", "1", _with_fsdp, "Lockstep runs FSDP2"),
    ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", _with_fsdp, "`lockstep export` writes whole weights"),
    ("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true", _with_zero, "`lockstep export` writes whole weights"),
)
