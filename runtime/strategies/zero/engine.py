"""Set-up of DeepSpeed's engine: the environment that it and Accelerate read, the process group, the Accelerator.

On CPUs the usual ways fail: with ``ACCELERATE_USE_CPU`` Accelerate silently drops DeepSpeed, and by default DeepSpeed compiles
its own communication library for minutes. So the backend of the process group is set to gloo explicitly.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from torch._C._distributed_c10d import HashStore

from runtime.distributed.process_groups import init_method
from runtime.environment import wants_cpu
from runtime.errors import ConfigurationError, Problem

# Set by `accelerate launch` to configure DeepSpeed; here the YAML does.
_IGNORED = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_CONFIG_DS_FIELDS")
_IGNORED_PREFIXES = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_GRADIENT_")
_ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
_DEPRECATION = r"`torch\.distributed\.\w+` is deprecated"
_COMMUNICATION_BUILD = "deepspeed_shm_comm"


def uses_cpu() -> bool:
    """Return whether this process computes on the CPU."""
    wanted = wants_cpu()
    return wanted or not torch.cuda.is_available()


def check_machine(json: Mapping[str, Any], *, on_cpu: bool) -> None:
    """Refuse settings that this machine does not support.

    Raises:
        ConfigurationError: naming the key.
    """
    zero = json["zero_optimization"]
    problems = []
    if on_cpu and json["fp16"]["enabled"]:
        problems.append(Problem("configuration", "precision", "DeepSpeed has no fp16 on CPUs; use bf16 or fp32"))
    nvme = [key for key in ("offload_optimizer", "offload_param") if zero.get(key, {}).get("device") == "nvme"]
    if nvme:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        what = None
        if on_cpu:  # compiling its extension there did not finish within 15 minutes (0.19.8)
            what = "nvme is for GPUs: on CPUs everything is in host memory already; remove it"
        elif not AsyncIOBuilder().is_compatible():
            what = "nvme needs DeepSpeed's asynchronous I/O, which needs libaio (apt-get install libaio-dev)"
        if what is not None:
            key = {"offload_param": "offload_parameters"}.get(nvme[0], nvme[0])
            problems.append(Problem("configuration", f"strategy.zero.{key}", what))
    if problems:
        raise ConfigurationError(problems)


@contextmanager
def environment(*, on_cpu: bool) -> Iterator[None]:
    """Set the environment that Accelerate and DeepSpeed need, without variables that would configure them; restored on exit.

    Suppresses their warnings meanwhile (deprecations in their imports).
    """
    before = dict(os.environ)
    for name in before:
        if name in _IGNORED or name.startswith(_IGNORED_PREFIXES):
            del os.environ[name]
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    for name, value in _ONE_PROCESS.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        # torch 2.13 renames two collectives that DeepSpeed 0.19 calls in every step.
        warnings.filterwarnings("ignore", _DEPRECATION, FutureWarning)
    finally:
        os.environ.clear()
        os.environ.update(before)


def make_accelerator(json: dict[str, Any], *, on_cpu: bool, timeout_seconds: float) -> Accelerator:
    """Join the process group and return the Accelerator. Call under :func:`environment`. Collective."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__[_COMMUNICATION_BUILD] = False
    backend, timeout = "gloo" if on_cpu else "nccl", timedelta(seconds=timeout_seconds)
    if "MASTER_ADDR" not in os.environ and not dist.is_initialized():  # one process needs no address
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    return Accelerator(
        mixed_precision="no",  # set in the JSON
        dynamo_backend="no",
        deepspeed_plugin=_Plugin(hf_ds_config=json, zero3_init_flag=False),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, init_method=init_method(), timeout=timeout)],
    )


def leave_process_group() -> None:
    """Leave the process group and reset DeepSpeed's global state, so that the next run starts as in a new process."""
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None  # still refers to the destroyed group
    # Stage 3 compares numbers of modules and parameters between ranks, whose earlier runs may differ.
    deepspeed.zero.Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


class _Plugin(DeepSpeedPlugin):  # type: ignore[misc]
    """Accelerate's plugin without its registration with transformers (1.15), which need not be installed.

    Registered with stage 3, transformers would partition pretrained models while building them, before Lockstep loads weights.
    """

    def set_deepspeed_weakref(self) -> None:
        """Do nothing."""
