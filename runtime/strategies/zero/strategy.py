"""ZeRO: optimizer state, gradients and parameters sharded over the processes by DeepSpeed, set up by Accelerate.

Accelerate makes the process group and the engine; the engine is then driven directly, because Accelerate's own wrapper steps
within ``backward`` and divides by a fixed number of microbatches. Here each window says where it ends
(``set_gradient_accumulation_boundary``), and nothing divides but the mean over ranks, which the world size undoes; stages 1
and 2 sum instead where passes are in half precision, which the world size is then no part of.

What differs from DDP, and why:

- Masters, optimizer state and gradient norms are float32, always. With ``precision: bf16`` or ``fp16`` passes work on
  half-precision copies of the weights, under autocast.
- A gradient whose norm is not finite is skipped by DeepSpeed itself, on all ranks alike, before anything has changed.
- A filler runs through the whole graph, since every rank must gather the same parameters; its gradients become zeros.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.config.zero_rules import UNUSED_PARAMETERS
from runtime.errors import ConfigurationError, Problem
from runtime.objective import Loss, TrainingModule, Weight, starting_gradient
from runtime.state.memory_layout import strides_to_keep
from runtime.strategies.placement import to_device
from runtime.strategies.unused_parameters import UnusedParameters
from runtime.strategies.update import Update
from runtime.strategies.zero.engine import (
    check_machine,
    chose_cpu,
    environment,
    leave_process_group,
    make_accelerator,
)
from runtime.strategies.zero.optimizers import unshardable
from runtime.strategies.zero.state import ZeroState, padded_part, shape_of
from runtime.strategies.zero.state_io import ZeroStateIO

Precision = Literal["fp32", "bf16", "fp16"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NOTHING: AbstractContextManager[None] = nullcontext()
_DEFAULT_BUCKET = 500_000_000  # elements; DeepSpeed's own default, allocated whatever the model's size


class ZeroStrategy:
    """ZeRO of stage 1, 2 or 3.

    Args:
        precision: of forward and backward passes.
        generated: DeepSpeed's JSON, as :func:`runtime.config.zero_json.generate` makes it.
        timeout_seconds: longest wait for the other ranks, to come together and in a collective.

    Raises:
        ConfigurationError: this machine cannot do what is asked for.
        PeerError: the ranks did not come together in time.
    """

    def __init__(self, *, precision: Precision, generated: Mapping[str, Any], timeout_seconds: float = 1800.0) -> None:
        self._json = deepcopy(dict(generated))
        self._stage: int = self._json["zero_optimization"]["stage"]
        on_cpu = chose_cpu()
        check_machine(self._json, on_cpu=on_cpu)
        self._owns_state = not PartialState._shared_state
        self._owns_group = not dist.is_initialized()
        self._told_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", "0")  # stage 3 looks for it in its passes
        with environment(on_cpu=on_cpu):
            self._accelerator = make_accelerator(self._json, on_cpu=on_cpu, timeout_seconds=timeout_seconds)
        # Accelerate's copy of the JSON, which is the one that is read.
        self._told: dict[str, Any] = self._accelerator.state.deepspeed_plugin.deepspeed_config
        self.device: torch.device = self._accelerator.device
        self.world_size: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        self._undone = 1.0 if self._json.get("gradient_allreduce_op") == "sum" else float(self.world_size)
        self._autocast_dtype = _HALF.get(precision)
        self._scales = precision == "fp16"
        self._module: TrainingModule | None = None
        self._engine: Any = None
        self.state_io = ZeroStateIO()
        self._parameters: list[nn.Parameter] = []
        self._filler = self._pending = False

    @property
    def collective_forward(self) -> bool:
        """Whether a forward pass gathers parameters: in stage 3, where the module is trained."""
        return self._stage == 3 and self._engine is not None

    def place(self, module: TrainingModule) -> TrainingModule:
        """Move a module to this rank's device; for stage 3, leave it on the CPU, from where it is cut up weight by weight."""
        return module if self._stage == 3 else module.to(self.device)

    def prepare(self, module: TrainingModule, optimizer: Optimizer) -> None:
        """Let DeepSpeed take over module and optimizer, which has not been stepped. Collective.

        Raises:
            ConfigurationError: the optimizer or a weight's type cannot be sharded.
        """
        why = unshardable(optimizer)
        if why is not None:
            raise ConfigurationError([Problem("configuration", "optimizer.target", why)])
        self._refuse_module(module)
        self._module = module
        layouts = _made_contiguous(module)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        groups = [list(group["params"]) for group in optimizer.param_groups]
        keys = sorted({key for group in optimizer.param_groups for key in group} - {"params"})
        originals = {id(p): p.detach().cpu().clone() for p in self._kept(module)}
        if self._autocast_dtype is not None:
            self._run_under_autocast(module)
        bucket = min(_DEFAULT_BUCKET, sum(p.numel() for p in self._parameters))
        self._told["zero_optimization"].setdefault("reduce_bucket_size", bucket)
        self._linear = torch.nn.functional.linear  # stage 3 puts its own in place, for all later runs of this process
        with environment(on_cpu=self.device.type == "cpu"):
            if self._stage == 3:
                self._cut_up(module)
            self._engine, _ = self._accelerator.prepare(module, optimizer)
        state = ZeroState(self._engine, groups, keys, self._stage, layouts)
        state.keep_frozen(originals)
        if self._autocast_dtype is not None:  # the float32 weights were made of the rounded ones
            state.set_weights({p: originals[id(p)] for p in self._parameters})
        self.state_io.attach(module, state, scaler=self._engine.optimizer.loss_scaler if self._scales else None)

    def prepare_evaluation(self, module: TrainingModule) -> None:
        """Take a module that is called and not trained: it is whole on every rank."""
        self._module = module.to(self.device)
        self.state_io.attach(self._module)

    def rewrap(self) -> None:
        """Refuse: what is trainable is decided when DeepSpeed cuts the parameters up."""
        raise AssertionError("model.unfreeze is refused with strategy.kind: zero")

    def warm_up(self, filler: Any) -> None:
        """Do nothing: DeepSpeed adds in one order from the first step on."""

    def unused_parameters(self, batch: Any) -> UnusedParameters | None:
        """Return the parameters that a batch gives no gradient. Collective."""
        names = {id(p): name.removeprefix("model.") for name, p in self.unwrapped.named_parameters() if p.requires_grad}
        used: set[int] = set()
        hooks = [p.register_hook(partial(_note, used, id(p))) for p in self._parameters]  # type: ignore[no-untyped-call]
        try:
            with self.microbatch(last=True):
                self.backward(self.forward(to_device(batch, self.device), filler=False).sum, weight=1.0)
        finally:
            for hook in hooks:
                hook.remove()
        self.discard()
        unused = [name for number, name in names.items() if number not in used]
        return UnusedParameters(unused, None, f"; {UNUSED_PARAMETERS}") if unused else None

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Say whether the window ends with this forward and backward pass."""
        self._engine.set_gradient_accumulation_boundary(last)
        return _NOTHING

    def forward(self, batch: Any, *, filler: bool) -> Loss:
        """Call the engine. A filler's loss is the real one, whose gradients ``backward`` turns into zeros. Collective."""
        loss: Loss = self._engine(batch)
        self._filler = filler
        return loss

    def backward(self, loss: Tensor, *, weight: Weight) -> None:
        """Add the gradient of ``loss / weight``. Where DeepSpeed averages over ranks, the world size is multiplied back in.

        Collective: from stage 2 on, each microbatch is reduced to the ranks that keep its parts.
        """
        scaled = (loss * starting_gradient(loss, weight, scale=self._undone)).sum()
        self._pending = True
        with self._zeros() if self._filler else _NOTHING:
            self._engine.backward(scaled, scale_wrt_gas=False)

    def step(self, max_grad_norm: float | None, *, measure_norm: bool) -> Update:
        """Let DeepSpeed judge, clip, apply and clear the gradient. Waits for the device, and is collective."""
        assert (max_grad_norm or 0.0) == self._json["gradient_clipping"]
        self._pending = False
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        return Update(not self._engine.was_step_applied(), diverged_if_skipped=not self._scales, grad_norm=norm)

    def discard(self) -> None:
        """Clear the gradient without applying it. Collective.

        DeepSpeed skips a step only if the gradient is not finite, so one element of it is made NaN.
        """
        if not self._pending:
            return
        scale = self.state_io.scaler_state()
        self._make_nan()
        self._pending = False
        self._engine.step()
        assert not self._engine.was_step_applied()
        self.state_io.load_scaler_state(scale)  # the gradient was finite, and the scale must not follow from this step

    def _make_nan(self) -> None:
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        smallest = min(self._parameters, key=lambda p: shape_of(p).numel())
        nan = torch.full(shape_of(smallest), torch.nan, device=self.device)
        if self._stage == 3:
            safe_set_local_grad(smallest, padded_part(smallest, nan))
        elif self._engine.optimizer.cpu_offload:
            # Norms of offloaded gradients are measured in the backward pass, as they are copied to the host (DeepSpeed 0.19).
            norms = self._engine.optimizer.norm_for_param_grads
            norms.update(dict.fromkeys(norms, torch.tensor(torch.nan)))
        else:
            safe_set_full_grad(smallest, nan)

    @property
    def unwrapped(self) -> TrainingModule:
        """The module as the user made it; in stage 3 its parameters are there during its own passes only."""
        assert self._module is not None
        return self._module

    def autocast(self) -> AbstractContextManager[None]:
        """Surround a forward pass outside training."""
        if self._autocast_dtype is None:
            return _NOTHING
        return cast(AbstractContextManager[None], torch.autocast(self.device.type, self._autocast_dtype))

    def output(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call the model alone. Collective in stage 3."""
        return self.unwrapped.model(*positional, **named)

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        dist.barrier()

    def close(self) -> None:
        """Leave the process group, if this strategy made it; DeepSpeed forgets all that it keeps for the whole process."""
        if self._engine is not None:
            self._engine.destroy()
            torch.nn.functional.linear = self._linear
        self._engine = None
        self.state_io.detach_engine()
        self._parameters = []
        if self._owns_group and dist.is_initialized():
            gc.unfreeze()
            self._accelerator.free_memory()
            leave_process_group()
        if self._told_rank:
            os.environ.pop("LOCAL_RANK", None)
        if self._owns_state:
            AcceleratorState._reset_state(reset_partial_state=True)

    def _refuse_module(self, module: TrainingModule) -> None:
        named = [(name.removeprefix("model."), p) for name, p in module.named_parameters() if p.requires_grad]
        other = next(((name, p.dtype) for name, p in named if p.dtype != torch.float32), None)
        if other is not None:
            what = (
                f"{other[0]} is {other[1]}, and DeepSpeed trains in float32 only; build the model in float32"
                + (", and say precision: bf16 for half-precision passes" if other[1].itemsize < 4 else "")
                + ", or use strategy.kind: ddp"
            )
            raise ConfigurationError([Problem("configuration", "model", what)])

    def _kept(self, module: TrainingModule) -> list[nn.Parameter]:
        """Return the parameters whose float32 values DeepSpeed would lose: rounded, or not trained and cut up."""
        half = self._autocast_dtype is not None
        return [p for p in module.parameters() if half or not p.requires_grad]

    def _cut_up(self, module: TrainingModule) -> None:
        """Leave on each rank its part of each weight, one weight after the other: no device ever holds the whole model.

        What DeepSpeed finds cut up it takes as it is; by itself it would first move the module to the device as a whole.
        """
        import deepspeed

        with torch.no_grad():
            for parameter in module.parameters():
                if self._autocast_dtype is not None and parameter.is_floating_point():
                    parameter.data = parameter.data.to(self._autocast_dtype)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.device)
        deepspeed.zero.Init(module=module, config_dict_or_path=self._json)

    def _run_under_autocast(self, module: TrainingModule) -> None:
        """Let the module's own passes run under autocast, within which DeepSpeed would switch one around it off."""
        forward = module.forward

        def under_autocast(batch: Any, filler: bool = False) -> Loss:
            with self.autocast():
                return forward(batch, filler)

        module.forward = under_autocast  # type: ignore[method-assign]

    @contextmanager
    def _zeros(self) -> Iterator[None]:
        """Turn gradients into zeros, whatever they are: zero times infinity would be NaN."""
        hooks = [p.register_hook(torch.zeros_like) for p in self._parameters]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _note(used: set[int], number: int, gradient: Tensor) -> None:
    used.add(number)


@torch.no_grad()
def _made_contiguous(module: nn.Module) -> dict[int, Sequence[int]]:
    """Make parameters contiguous, as DeepSpeed takes them alone; return the strides they had, by identity."""
    layouts: dict[int, Sequence[int]] = {}
    for parameter in module.parameters():
        strides = strides_to_keep(parameter)
        if strides is not None:
            layouts[id(parameter)] = strides
        parameter.data = parameter.data.contiguous()
    return layouts
