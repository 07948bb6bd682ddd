"""Table of the settings of ``accelerate launch`` and the environment: variable, option, Lockstep's key, parser.

The launcher sets most variables whether or not the user chose a value, so a value that equals the launcher's default is
ignored. ``launcher.py`` applies the settings. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Variables = Mapping[str, str]

ACCUMULATION = "batch.micro_size"
"""The key for gradient accumulation: the microbatch size that results in the given number of microbatches."""


class NoKeyError(ValueError):
    """A setting that Lockstep has no key for; the message says what to do."""


@dataclass(frozen=True)
class LauncherSetting:
    """A setting of the launcher and the corresponding key of the YAML.

    Args:
        variable: the environment variable.
        option: of ``accelerate launch``.
        key: dotted path in the YAML.
        read: parses the variable's text to the key's value; None if it is the launcher's default.
        counts: whether it applies, given the other variables.
    """

    variable: str
    option: str
    key: str
    read: Callable[[str], Any]
    counts: Callable[[Variables], bool] = lambda variables: True


def _choice(choices: Mapping[str, Any], message: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text.lower() not in choices:
            raise NoKeyError(message)
        return choices[text.lower()]

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
    """Return whether a variable's text is true, as Accelerate parses it."""
    return text.lower() in ("1", "true", "yes", "y", "on", "t")


def _file(text: str) -> Any:
    return None if text.lower() in ("", "none") else str(Path(text).absolute())


def _classes(text: str) -> Any:
    return [name.strip() for name in text.split(",") if name.strip()] or None


def _reshards(text: str) -> Any:
    names = {"false": False, "shard_grad_op": False, "2": False, "true": None, "full_shard": None, "1": None}
    return _choice(
        names, "is a sharding that strategy.fsdp does not have; for hybrid sharding set strategy.fsdp.replicas"
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
        _choice(_PRECISIONS, "is a precision that Lockstep does not have; use bf16 or fp16"),
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
        _choice(_OFFLOADS, "is not an offload device; use cpu or nvme"),
        _with_zero,
    ),
    LauncherSetting(
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        "--offload_param_device",
        "strategy.zero.offload_parameters",
        _choice(_OFFLOADS, "is not an offload device; use cpu or nvme"),
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

# Settings without a key, refused rather than ignored: variable, option, when it applies, what to do.
REFUSED: tuple[tuple[str, str, Callable[[Variables], bool], str], ...] = (
    (
        "ACCELERATE_USE_MEGATRON_LM",
        "--use_megatron_lm",
        _always,
        "Lockstep does not run Megatron-LM; use strategy.kind: fsdp or zero",
    ),
    (
        "ACCELERATE_USE_PARALLELISM_CONFIG",
        "--use_parallelism_config",
        _always,
        "Lockstep has no tensor or sequence parallelism; it shards with strategy.kind: fsdp, in groups with "
        "strategy.fsdp.replicas",
    ),
    (
        f"{_DYNAMO}USE_REGIONAL_COMPILATION",
        "--dynamo_use_regional_compilation",
        _compiles,
        "leave it out, and set compile.blocks to the classes of the blocks to compile separately",
    ),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        "--fsdp_activation_checkpointing",
        _with_fsdp,
        "leave it out, and set model.checkpoint_activations to the classes of the blocks to recompute",
    ),
    ("FSDP_IGNORED_MODULES", "--fsdp_ignored_modules", _with_fsdp, "strategy.fsdp shards all modules"),
    (
        "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
        "--deepspeed_moe_layer_cls_names",
        _with_zero,
        "strategy.zero does not support mixture-of-experts layers",
    ),
    ("ACCELERATE_DOWNCAST_BF16", "--downcast_bf16", _always, "it is for TPUs, which Lockstep does not run on"),
)
# Settings without effect on the result: variable, value, when it applies, what Lockstep does instead.
WITHOUT_EFFECT: tuple[tuple[str, str, Callable[[Variables], bool], str], ...] = (
    ("FSDP_VERSION", "1", _with_fsdp, "Lockstep runs FSDP2"),
    ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", _with_fsdp, "`lockstep export` writes whole weights"),
    ("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true", _with_zero, "`lockstep export` writes whole weights"),
)
