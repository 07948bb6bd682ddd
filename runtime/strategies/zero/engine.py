"""How DeepSpeed's engine comes to be: the environment that it and Accelerate read, the process group, the Accelerator.

On CPUs the obvious ways are wrong: with ``ACCELERATE_USE_CPU`` Accelerate drops DeepSpeed without a word, and DeepSpeed
compiles a communication library of its own for minutes. So the process group is gloo, said explicitly.
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

# What `accelerate launch` leaves for its own way of making the engine: the YAML says all of it.
_NOT_READ = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_CONFIG_DS_FIELDS")
_NOT_READ_PREFIXES = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_GRADIENT_")
_ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
_RENAMED = r"`torch\.distributed\.\w+` is deprecated"
_COMMUNICATION_BUILD = "deepspeed_shm_comm"


def chose_cpu() -> bool:
    """Tell whether this process computes on the CPU."""
    wanted = wants_cpu()
    return wanted or not torch.cuda.is_available()


def check_machine(json: Mapping[str, Any], *, on_cpu: bool) -> None:
    """Refuse what this machine cannot do.

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
        if on_cpu:  # it is compiled there as well, which did not end within a quarter of an hour (0.19.8)
            what = "nvme is for GPUs: on CPUs the host's memory is where everything is; leave it out"
        elif not AsyncIOBuilder().is_compatible():
            what = (
                "nvme needs DeepSpeed's asynchronous reads and writes, which need libaio (apt-get install libaio-dev)"
            )
        if what is not None:
            key = {"offload_param": "offload_parameters"}.get(nvme[0], nvme[0])
            problems.append(Problem("configuration", f"strategy.zero.{key}", what))
    if problems:
        raise ConfigurationError(problems)


@contextmanager
def environment(*, on_cpu: bool) -> Iterator[None]:
    """Let Accelerate and DeepSpeed find what they look for in the environment, and nothing else, for a while.

    What they warn of meanwhile (their imports' deprecations) is no affair of the run's.
    """
    before = dict(os.environ)
    for name in before:
        if name in _NOT_READ or name.startswith(_NOT_READ_PREFIXES):
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
        warnings.filterwarnings("ignore", _RENAMED, FutureWarning)
    finally:
        os.environ.clear()
        os.environ.update(before)


def make_accelerator(json: dict[str, Any], *, on_cpu: bool, timeout_seconds: float) -> Accelerator:
    """Join the process group and return what prepares the engine. Collective, under :func:`environment`."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__[_COMMUNICATION_BUILD] = False
    backend, timeout = "gloo" if on_cpu else "nccl", timedelta(seconds=timeout_seconds)
    if "MASTER_ADDR" not in os.environ and not dist.is_initialized():  # one process needs no address
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    return Accelerator(
        mixed_precision="no",  # the JSON says it
        dynamo_backend="no",
        deepspeed_plugin=_Plugin(hf_ds_config=json, zero3_init_flag=False),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, init_method=init_method(), timeout=timeout)],
    )


def leave_process_group() -> None:
    """Leave, and let DeepSpeed forget what it keeps for the life of a process, so that the next run begins as in a new one."""
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None  # the group that is gone
    # Stage 3 compares its numbers of modules and parameters between ranks, which may have had different runs before.
    deepspeed.zero.Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


class _Plugin(DeepSpeedPlugin):  # type: ignore[misc]
    """Accelerate's, less its message to the package transformers (1.15), which need not be installed.

    Told of stage 3, transformers would cut pretrained models up while they are built, before Lockstep has given them weights.
    """

    def set_deepspeed_weakref(self) -> None:
        """Tell nobody."""
