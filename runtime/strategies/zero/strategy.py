"""ZeRO: optimizer state, gradients and parameters sharded over the processes by DeepSpeed, set up by Accelerate.

Accelerate creates the process group and the engine; the engine is then called directly, because Accelerate's wrapper steps
within ``backward`` and divides by a fixed number of microbatches. Here the end of a window is set explicitly
(``set_gradient_accumulation_boundary``), and the only division is the mean over ranks, which multiplying by the world size
undoes. With half-precision passes, stages 1 and 2 sum instead, so that values are independent of the world size.

What differs from DDP, and why:

- Master weights, optimizer state and gradient norms are always float32. With ``precision: bf16`` or ``fp16`` passes use
  half-precision copies of the weights, under autocast.
- DeepSpeed itself skips a gradient whose norm is not finite, on all ranks alike, before anything has changed.
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
from runtime.data.batches import slots_of_rank
from runtime.distributed.slot_reduction import RankReduction
from runtime.errors import ConfigurationError, Problem
from runtime.objective import Loss, TrainingModule, Weight, starting_gradient
from runtime.state.memory_layout import strides_to_keep
from runtime.strategies.placement import to_device
from runtime.strategies.unused_parameters import UnusedParameters
from runtime.strategies.update import Update
from runtime.strategies.zero.engine import (
    check_machine,
    environment,
    leave_process_group,
    make_accelerator,
    uses_cpu,
)
from runtime.strategies.zero.optimizers import unshardable
from runtime.strategies.zero.state import ZeroState, padded_part, shape_of
from runtime.strategies.zero.state_io import ZeroStateIO

Precision = Literal["fp32", "bf16", "fp16"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NO_CONTEXT: AbstractContextManager[None] = nullcontext()
_DEFAULT_BUCKET = 500_000_000  # elements; DeepSpeed's default, which it allocates for a model of any size


class ZeroStrategy:
    """ZeRO of stage 1, 2 or 3.

    Args:
        precision: of forward and backward passes.
        generated: DeepSpeed's JSON, from :func:`runtime.config.zero_json.generate`.
        timeout_seconds: for the rendezvous and for each collective.

    Raises:
        ConfigurationError: this machine does not support a setting.
        PeerError: the rendezvous timed out.
    """

    def __init__(self, *, precision: Precision, generated: Mapping[str, Any], timeout_seconds: float = 1800.0) -> None:
        self._json = deepcopy(dict(generated))
        self._stage: int = self._json["zero_optimization"]["stage"]
        on_cpu = uses_cpu()
        check_machine(self._json, on_cpu=on_cpu)
        self._owns_state = not PartialState._shared_state
        self._owns_group = not dist.is_initialized()
        self._set_local_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", "0")  # stage 3 reads it in its passes
        with environment(on_cpu=on_cpu):
            self._accelerator = make_accelerator(self._json, on_cpu=on_cpu, timeout_seconds=timeout_seconds)
        # Accelerate's copy of the JSON, the one that DeepSpeed reads.
        self._engine_json: dict[str, Any] = self._accelerator.state.deepspeed_plugin.deepspeed_config
        self.device: torch.device = self._accelerator.device
        self.world_size: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        sums = self._json.get("gradient_allreduce_op") == "sum"
        self._gradient_factor = 1.0 if sums else float(self.world_size)  # undoes DeepSpeed's mean over ranks
        self._autocast_dtype = _HALF.get(precision)
        self._scales = precision == "fp16"
        self._module: TrainingModule | None = None
        self._engine: Any = None
        self.state_io = ZeroStateIO()
        self._parameters: list[nn.Parameter] = []
        self._filler = self._pending = False

    @property
    def collective_forward(self) -> bool:
        """Whether a forward pass gathers parameters: in stage 3, if the module is trained."""
        return self._stage == 3 and self._engine is not None

    def place(self, module: TrainingModule) -> TrainingModule:
        """Move a module to this rank's device; in stage 3, leave it on the CPU, to be partitioned weight by weight."""
        return module if self._stage == 3 else module.to(self.device)

    def prepare(self, module: TrainingModule, optimizer: Optimizer, *, slots: int) -> None:
        """Let DeepSpeed take over module and optimizer, which must not have been stepped. Collective.

        Raises:
            ConfigurationError: DeepSpeed does not support the optimizer or a weight's dtype.
        """
        reason = unshardable(optimizer)
        if reason is not None:
            raise ConfigurationError([Problem("configuration", "optimizer.target", reason)])
        self._refuse_module(module)
        self.slot_reduction = RankReduction(
            slots_of_rank(slots, self.world_size, self.rank), world_size=self.world_size
        )
        self._module = module
        layouts = _make_contiguous(module)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        groups = [list(group["params"]) for group in optimizer.param_groups]
        keys = sorted({key for group in optimizer.param_groups for key in group} - {"params"})
        originals = {id(p): p.detach().cpu().clone() for p in self._to_preserve(module)}
        if self._autocast_dtype is not None:
            self._run_under_autocast(module)
        bucket = min(_DEFAULT_BUCKET, sum(p.numel() for p in self._parameters))
        self._engine_json["zero_optimization"].setdefault("reduce_bucket_size", bucket)
        self._linear = torch.nn.functional.linear  # stage 3 replaces it for the whole process; close() restores it
        with environment(on_cpu=self.device.type == "cpu"):
            if self._stage == 3:
                self._partition(module)
            self._engine, _ = self._accelerator.prepare(module, optimizer)
        state = ZeroState(self._engine, groups, keys, self._stage, layouts)
        state.keep_frozen(originals)
        if self._autocast_dtype is not None:  # DeepSpeed made the float32 weights from rounded ones
            state.set_weights({p: originals[id(p)] for p in self._parameters})
        self.state_io.attach(module, state, scaler=self._engine.optimizer.loss_scaler if self._scales else None)

    def prepare_evaluation(self, module: TrainingModule) -> None:
        """Prepare a module for forward passes without training: it is whole on every rank."""
        self._module = module.to(self.device)
        self.state_io.attach(self._module)

    def rewrap(self) -> None:
        """Not supported: trainability is fixed when DeepSpeed partitions the parameters."""
        raise AssertionError("model.unfreeze is refused with strategy.kind: zero")

    def warm_up(self, filler: Any) -> None:
        """Do nothing: DeepSpeed's summation order is the same from the first step on."""

    def unused_parameters(self, batch: Any) -> UnusedParameters | None:
        """Return the parameters that a batch gives no gradient. Collective."""
        names = {id(p): name.removeprefix("model.") for name, p in self.unwrapped.named_parameters() if p.requires_grad}
        used: set[int] = set()
        hooks = [p.register_hook(partial(_note, used, id(p))) for p in self._parameters]  # type: ignore[no-untyped-call]
        try:
            with self.microbatch(slot=-1, last=True):
                self.backward(self.forward(to_device(batch, self.device), filler=False).sum, weight=1.0)
        finally:
            for hook in hooks:
                hook.remove()
        self.discard()
        unused = [name for number, name in names.items() if number not in used]
        return UnusedParameters(unused, None, f"; {UNUSED_PARAMETERS}") if unused else None

    def microbatch(self, *, slot: int, last: bool) -> AbstractContextManager[None]:
        """Set whether the window ends with this forward and backward pass."""
        self._engine.set_gradient_accumulation_boundary(last)
        return _NO_CONTEXT

    def forward(self, batch: Any, *, filler: bool) -> Loss:
        """Call the engine. A filler's loss is a real one; ``backward`` replaces its gradients by zeros. Collective."""
        loss: Loss = self._engine(batch)
        self._filler = filler
        return loss

    def backward(self, loss: Tensor, *, weight: Weight) -> None:
        """Add the gradient of ``loss / weight``, times the world size if DeepSpeed averages over ranks.

        Collective: from stage 2 on, each microbatch's gradient is reduced to the ranks that keep its parts.
        """
        scaled = (loss * starting_gradient(loss, weight, scale=self._gradient_factor)).sum()
        self._pending = True
        with self._zeroed_gradients() if self._filler else _NO_CONTEXT:
            self._engine.backward(scaled, scale_wrt_gas=False)

    def step(self, max_grad_norm: float | None, *, measure_norm: bool) -> Update:
        """Let DeepSpeed check, clip, apply and clear the gradient. Waits for the device. Collective."""
        assert (max_grad_norm or 0.0) == self._json["gradient_clipping"]
        self._pending = False
        self._engine.step()
        if not self._engine.was_step_applied():
            self._gather_small()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        return Update(not self._engine.was_step_applied(), diverged_if_skipped=not self._scales, grad_norm=norm)

    def discard(self) -> None:
        """Clear the gradient without applying it. Collective.

        DeepSpeed skips a step only if the gradient is not finite, so NaN is written into it.
        """
        if not self._pending:
            return
        scale = self.state_io.scaler_state()
        self._make_nan()
        self._pending = False
        self._engine.step()
        assert not self._engine.was_step_applied()
        self._gather_small()
        self.state_io.load_scaler_state(scale)  # the NaN was artificial, so it must not change the scale

    def _gather_small(self) -> None:
        """Gather the parameters that stage 3 keeps whole: DeepSpeed (0.19) does so after an applied step only. Collective.

        A module that reads such a weight of another one would otherwise be recorded as another order of modules, which ends the
        next forward pass with a tracing error.
        """
        small = self._engine.optimizer.persistent_parameters if self._stage == 3 else []
        if small:
            small[0].all_gather(small)

    def _make_nan(self) -> None:
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        smallest = min(self._parameters, key=lambda p: shape_of(p).numel())
        nan = torch.full(shape_of(smallest), torch.nan, device=self.device)
        if self._stage == 3:
            safe_set_local_grad(smallest, padded_part(smallest, nan))
        elif self._engine.optimizer.cpu_offload:
            # Norms of offloaded gradients are computed during backward, as they are copied to the host (DeepSpeed 0.19).
            norms = self._engine.optimizer.norm_for_param_grads
            norms.update(dict.fromkeys(norms, torch.tensor(torch.nan)))
        else:
            safe_set_full_grad(smallest, nan)

    @property
    def unwrapped(self) -> TrainingModule:
        """The module without the engine; in stage 3 its parameters are gathered only during its own passes."""
        assert self._module is not None
        return self._module

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context for a forward pass outside training."""
        if self._autocast_dtype is None:
            return _NO_CONTEXT
        return cast(AbstractContextManager[None], torch.autocast(self.device.type, self._autocast_dtype))

    def output(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call the model without its objective. Collective in stage 3."""
        return self.unwrapped.model(*positional, **named)

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        dist.barrier()

    def close(self) -> None:
        """Leave the process group if this strategy created it, and reset DeepSpeed's global state."""
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
        if self._set_local_rank:
            os.environ.pop("LOCAL_RANK", None)
        if self._owns_state:
            AcceleratorState._reset_state(reset_partial_state=True)

    def _refuse_module(self, module: TrainingModule) -> None:
        named = [(name.removeprefix("model."), p) for name, p in module.named_parameters() if p.requires_grad]
        other = next(((name, p.dtype) for name, p in named if p.dtype != torch.float32), None)
        if other is not None:
            what = (
                f"{other[0]} is {other[1]}, but DeepSpeed trains in float32 only; build the model in float32"
                + (", with precision: bf16 for half-precision passes" if other[1].itemsize < 4 else "")
                + ", or use strategy.kind: ddp"
            )
            raise ConfigurationError([Problem("configuration", "model", what)])

    def _to_preserve(self, module: TrainingModule) -> list[nn.Parameter]:
        """Return the parameters whose values DeepSpeed would lose: rounded ones, or untrained partitioned ones."""
        half = self._autocast_dtype is not None
        return [p for p in module.parameters() if half or not p.requires_grad]

    def _partition(self, module: TrainingModule) -> None:
        """Partition the weights over the ranks one by one, so that no device ever holds the whole model.

        DeepSpeed accepts a partitioned module; otherwise it would first move the whole module to the device.
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
        """Run the module's forward under autocast; DeepSpeed disables an autocast around the engine's call."""
        forward = module.forward

        def under_autocast(batch: Any, filler: bool = False) -> Loss:
            with self.autocast():
                return forward(batch, filler)

        module.forward = under_autocast  # type: ignore[method-assign]

    @contextmanager
    def _zeroed_gradients(self) -> Iterator[None]:
        """Replace all gradients by zeros; scaling the loss by zero would turn infinity into NaN."""
        hooks = [p.register_hook(torch.zeros_like) for p in self._parameters]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _note(used: set[int], number: int, gradient: Tensor) -> None:
    used.add(number)


@torch.no_grad()
def _make_contiguous(module: nn.Module) -> dict[int, Sequence[int]]:
    """Make parameters contiguous, which DeepSpeed requires; return the strides of those that were not, by ``id``."""
    layouts: dict[int, Sequence[int]] = {}
    for parameter in module.parameters():
        strides = strides_to_keep(parameter)
        if strides is not None:
            layouts[id(parameter)] = strides
        parameter.data = parameter.data.contiguous()
    return layouts
