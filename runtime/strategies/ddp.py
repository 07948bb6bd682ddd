"""DistributedDataParallel, or a single process, set up by Accelerate.

Accelerate creates the process group, chooses the device and wraps the module. Accumulation, autocast, the loss scale,
clipping and the optimizer's step are implemented here: Accelerate's versions average over ranks, divide by a fixed number of
microbatches, and cost 0.1 to 0.2 ms a step.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as WrappedInDDP
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import Optimizer

from runtime.config.strategy import DDPSection
from runtime.data.batches import slots_of_rank
from runtime.distributed.process_groups import init_method
from runtime.distributed.slot_reduction import RankReduction, SlotReduction
from runtime.errors import GradientError
from runtime.objective import Loss, TrainingModule, Weight, starting_gradient
from runtime.optimization.latecomers import Latecomers
from runtime.randomness import preserved_random_state
from runtime.state.module_buffers import preserved_buffers
from runtime.strategies.finite import all_finite, norm_of
from runtime.strategies.mixed_precision import (
    HALF,
    Precision,
    forward_context,
    make_accelerator,
    refuse_lost_scale,
    refuse_weights,
    wrapped_module,
)
from runtime.strategies.placement import to_device
from runtime.strategies.reduction import (
    keep_buffers_from_being_sent,
    not_reduced,
    refuse_hook,
    refuse_sparse,
    sum_gradients,
    unreduced,
)
from runtime.strategies.unhooked_step import unhooked_step
from runtime.strategies.unused_parameters import LEAVE_OUT, UnusedParameters
from runtime.strategies.update import DeviceFlag, Update
from runtime.strategies.whole_state import WholeState

_NO_CONTEXT: AbstractContextManager[None] = nullcontext()  # stateless, so it can be shared


class DDPStrategy:
    """Data parallelism in which every process holds the whole model.

    Args:
        precision: of forward and backward passes.
        options: of DistributedDataParallel.
        max_grad_value: gradient elements are clamped to plus or minus this value; None does not clamp.
        timeout_seconds: for the rendezvous and for each collective.

    Raises:
        PeerError: the rendezvous timed out.

    Attributes:
        skipping_devices: device types on which the optimizer itself may skip an update, so that the host need not wait.
    """

    skipping_devices: tuple[str, ...] = ("cuda",)
    collective_forward = False

    def __init__(
        self,
        *,
        precision: Precision,
        options: DDPSection,
        max_grad_value: float | None = None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self._owns_state = not PartialState._shared_state
        self._owns_group = not dist.is_initialized()
        self._accelerator = make_accelerator(
            precision,
            [
                DistributedDataParallelKwargs(
                    broadcast_buffers=False,  # the training loop keeps buffers equal in another way
                    bucket_cap_mb=cast(int, options.bucket_mb),
                    find_unused_parameters=options.find_unused_parameters,
                    gradient_as_bucket_view=options.gradient_as_bucket_view,
                    static_graph=options.static_graph,
                ),
                InitProcessGroupKwargs(init_method=init_method(), timeout=timedelta(seconds=timeout_seconds)),
            ],
        )
        self.device: torch.device = self._accelerator.device
        self.world_size: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        self._scaler: torch.amp.GradScaler | None = self._accelerator.scaler
        self._forward_context = forward_context(self._accelerator)
        self._module: TrainingModule | None = None
        self._parameters, self._names = list[nn.Parameter](), list[str]()
        self._uniform = self._all_fp32 = False
        self._wrapped: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._optimizer_step: Callable[[], Any] | None = None
        self._options, self._hook = options, options.communication_hook
        self.state_io = WholeState(self._scaler, on_new_layout=self._rewrap_for_layout)
        self._max_grad_value = max_grad_value

    def place(self, module: TrainingModule) -> TrainingModule:
        """Move a module to this rank's device."""
        return module.to(self.device)

    def prepare(self, module: TrainingModule, optimizer: Optimizer, *, slots: int) -> None:
        """Wrap module and optimizer. Collective.

        Raises:
            ConfigurationError: the process group or the weights' dtypes do not support the options.
        """
        if self.world_size > 1:
            refuse_hook(self._hook, self.device)
        self.slot_reduction = self._reduction(slots)
        refuse_weights(module, scaled=self._scaler is not None, clamped=self._max_grad_value is not None)
        self._module = module
        self.state_io.attach(module, optimizer)
        module.silent_fillers = True
        self._wrap()
        # The optimizer is on the device already; placing it again would reload its state, and cast it.
        self._optimizer = self._accelerator.prepare_optimizer(optimizer, device_placement=False).optimizer
        assert self._optimizer is not None
        self._optimizer_step = unhooked_step(self._optimizer)
        self._latecomers = Latecomers(self._optimizer)

    def _reduction(self, slots: int) -> SlotReduction:
        return RankReduction(slots_of_rank(slots, self.world_size, self.rank), world_size=self.world_size)

    def rewrap(self) -> None:
        """Wrap the module again after the set of trainable parameters has changed. Collective.

        DDP reduces the parameters that were trainable when it was created. The previous wrapper is garbage-collected first, to
        free its buckets and remove its hooks from the parameters.
        """
        self.discard()
        self._wrapped = None
        gc.unfreeze()  # objects frozen at the start of the training loop would not be collected
        self._accelerator.free_memory()
        gc.freeze()
        self._wrap()

    def _wrap(self) -> None:
        assert self._module is not None
        self._collect_trainable(self._module)
        self._uniform = len({(p.device, p.dtype) for p in self._parameters}) == 1
        self._all_fp32 = self._uniform and self._parameters[0].dtype == torch.float32
        keep_buffers_from_being_sent(self._module)
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; Accelerate 1.15 has no other way to turn it off.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._wrapped = wrapped_module(self._accelerator, self._module)
        if isinstance(self._wrapped, WrappedInDDP):
            sum_gradients(self._wrapped, sent_as=None if self._hook is None else HALF[self._hook])

    def _rewrap_for_layout(self) -> None:
        """Wrap again after parameters adopted other strides: DDP's buckets depend on the previous ones."""
        if self._wrapped is not None and self.world_size > 1:
            self.rewrap()

    def _collect_trainable(self, module: TrainingModule) -> None:
        """Cache the trainable parameters and their names: walking the module at each step would cost 50 µs."""
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._names = [name.removeprefix("model.") for name, _ in named]
        self._parameters = [parameter for _, parameter in named]

    def prepare_evaluation(self, module: TrainingModule) -> None:
        """Prepare a module for forward passes without training."""
        self._module = module
        self.state_io.attach(module)

    def warm_up(self, filler: Any) -> None:
        """Run one filler forward and backward. Collective.

        DDP rebuilds its buckets after its first backward pass; without this, the first step of a resumed run would sum in
        another order than the same step of an uninterrupted one.
        """
        if self.world_size == 1:
            return
        preserved = preserved_random_state(self.device), preserved_buffers(self.unwrapped)
        with preserved[0], preserved[1], self.microbatch(slot=-1, last=True), warnings.catch_warnings():
            # Raised by models that change their layout in the first pass; the buckets are rebuilt after it.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            self.backward(self.forward(to_device(filler, self.device), filler=True).sum, weight=1.0)
        self.discard()

    def unused_parameters(self, batch: Any) -> UnusedParameters | None:
        """Return the parameters that a batch gives no gradient; None if all have one, or DDP searches for them in each step.

        Calls the module without its wrapper and does not accumulate gradients, so DDP's state is unaffected.
        """
        with self.autocast():
            loss = self.unwrapped(to_device(batch, self.device)).sum
        gradients = torch.autograd.grad(loss.sum(), self._parameters, allow_unused=True)
        refuse_sparse(self._names, gradients)
        names = [name for name, gradient in zip(self._names, gradients, strict=True) if gradient is None]
        if not names or self._options.find_unused_parameters:
            return None
        key = "strategy.ddp.find_unused_parameters"
        if self.world_size > 1 and not self._options.static_graph:
            remedy = (
                f"the ranks' gradients cannot be summed. Set it to true if other steps use them; otherwise {LEAVE_OUT}"
            )
            return UnusedParameters(names, tuple(key.split(".")), remedy)
        remedy = f", so these do not train them; {LEAVE_OUT}; several processes need {key}: true"
        return UnusedParameters(names, None, remedy)

    def microbatch(self, *, slot: int, last: bool) -> AbstractContextManager[None]:
        """Return a context for one forward and backward pass; gradients are reduced in a window's last one. Collective."""
        if last or self.world_size == 1:
            return _NO_CONTEXT
        return cast(AbstractContextManager[None], self._accelerator.no_sync(self._wrapped))

    def forward(self, batch: Any, *, filler: bool) -> Loss:
        """Call the wrapped module under autocast."""
        assert self._wrapped is not None
        with self._forward_context:
            loss: Loss = self._wrapped(batch, filler)
        return loss

    def backward(self, loss: Tensor, *, weight: Weight) -> None:
        """Add the gradient of ``loss / weight``.

        The factor is passed as the starting gradient, which costs less than extra operations. It is independent of the world
        size, so overflow and rounding of a slot in half precision are the same on any number of processes.
        """
        factor = starting_gradient(loss, weight)
        if self._scaler is not None:
            factor = self._scaler.scale(factor)
        loss.backward(factor)  # type: ignore[no-untyped-call]

    def step(self, max_grad_norm: float | None, *, measure_norm: bool) -> Update:
        """Check, clip and apply the gradient, and clear it.

        Reduced gradients are checked, so all ranks decide alike. On a GPU, torch's optimizer skips the update itself where it
        can. Otherwise this waits for the device: the host reads one flag before the update.
        """
        assert self._optimizer is not None and self._optimizer_step is not None
        self._require_reduced()
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        gradients = self._gradients()
        # The check is the same at every step: the norm of finite gradients can overflow, so how often it is reported must not
        # decide whether a step is applied.
        check_norm = max_grad_norm is not None or not self._all_fp32
        grad_norm = self._norm(gradients) if check_norm or measure_norm else None
        if self._skips_on_device():
            return self._step_on_device(gradients, max_grad_norm, grad_norm, check_norm=check_norm)
        finite = math.isfinite(grad_norm) if check_norm and grad_norm is not None else all_finite(gradients)
        if finite:
            self._clip(gradients, max_grad_norm, grad_norm)
            self._latecomers.update()
            # Not the scaler's step: it passes its factors to the kernel again, which only fused ones accept.
            self._optimizer_step()
        self._clear()
        if self._scaler is not None:
            self._scaler.update()
            refuse_lost_scale(self._scaler)
        return Update(skipped=not finite, diverged_if_skipped=self._scaler is None, grad_norm=grad_norm)

    def _step_on_device(
        self, gradients: list[Tensor], max_grad_norm: float | None, grad_norm: Tensor | None, *, check_norm: bool
    ) -> Update:
        """Queue the check and the update of :meth:`step` without waiting for either."""
        optimizer: Any = self._optimizer
        assert self._optimizer_step is not None
        found_inf = gradients[0].new_zeros((), dtype=torch.float32)
        if check_norm and grad_norm is not None:
            found_inf += ~torch.isfinite(grad_norm)
        else:
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, found_inf.new_ones(()))
        self._clip(gradients, max_grad_norm, grad_norm)
        optimizer.found_inf = found_inf
        self._optimizer_step()
        del optimizer.found_inf
        self._clear()
        return Update(skipped=DeviceFlag(found_inf), diverged_if_skipped=True, grad_norm=grad_norm)

    def _gradients(self) -> list[Tensor]:
        """Return this rank's part of the reduced gradient."""
        return [grad for p in self._parameters if (grad := p.grad) is not None]

    def _clip(self, gradients: list[Tensor], max_grad_norm: float | None, grad_norm: Tensor | None) -> None:
        if max_grad_norm is not None and grad_norm is not None:
            clip_grads_with_norm_(self._parameters, max_grad_norm, grad_norm)
        elif self._max_grad_value is not None:
            clip_grad_value_(self._parameters, self._max_grad_value)

    def _skips_on_device(self) -> bool:
        """Return whether the optimizer's kernel can skip an update without changing a bit (``found_inf``).

        Torch's fused optimizers can, once their state exists: if the very first step is skipped, SGD keeps momentum buffers
        that it never filled (torch 2.13).
        """
        optimizer = self._optimizer
        return (
            self.device.type in self.skipping_devices
            and self._scaler is None
            and getattr(optimizer, "_step_supports_amp_scaling", False)
            and type(optimizer).__module__.startswith("torch.optim.")  # not a subclass, which may override step
            and optimizer is not None
            and len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
        )

    def discard(self) -> None:
        """Clear the gradient without applying it."""
        self._require_reduced()  # otherwise the next forward pass fails with DDP's message
        self._clear()

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _require_reduced(self) -> None:
        """Check that gradients are summed over the ranks.

        Raises:
            GradientError: the last microbatch of the window did not use every parameter.
        """
        if isinstance(self._wrapped, WrappedInDDP):
            names = unreduced(self._wrapped, self._names)
            if names:
                raise GradientError(not_reduced(names))

    @property
    def unwrapped(self) -> TrainingModule:
        """The module without DDP's wrapper."""
        assert self._module is not None
        return self._module

    def autocast(self) -> AbstractContextManager[None]:
        """Return an autocast context for a forward pass."""
        return cast(AbstractContextManager[None], self._accelerator.autocast())

    def output(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call the model without its objective."""
        return self.unwrapped.model(*positional, **named)

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group if this strategy created it.

        The order matters: destroying a gloo group while DDP's reducer still exists can abort the interpreter at exit, and a
        finished run would report failure.
        """
        self._wrapped = self._optimizer = self._optimizer_step = None
        self.state_io.detach()
        if self._owns_group and dist.is_initialized():
            self._accelerator.free_memory()  # collects garbage, the reducer included
            dist.destroy_process_group()
        if self._owns_state:  # the next run in this process may have another world size or device
            AcceleratorState._reset_state(reset_partial_state=True)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return norm_of(gradients, uniform=self._uniform)
