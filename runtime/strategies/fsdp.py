"""FSDP2: every rank holds a part of each parameter, of its gradient and of its optimizer state.

Blocks are gathered one at a time for their forward and backward pass. Accelerate makes the process group and chooses the
device, as for DDP; the sharding is torch's own ``fully_shard``. Accelerate's plugin (1.15) is not used: with a CPU it gives
plain DDP without a word, it cannot shard on one process, by size it wraps containers that torch refuses, and an optimizer that
makes its state at once (Adagrad) keeps that of parameters that are gone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.optim import Optimizer

from runtime.config.component import ComponentError
from runtime.config.strategy import DDPSection, FSDPSection
from runtime.errors import ConfigurationError, Problem
from runtime.objective import Loss, ModelCall, TrainingModule
from runtime.optimization.combined import members
from runtime.optimization.latecomers import Latecomers
from runtime.strategies.blocks import blocks_of_classes, blocks_of_size
from runtime.strategies.ddp import DDPStrategy
from runtime.strategies.fsdp_state import FSDPState
from runtime.strategies.fsdp_tensors import local
from runtime.strategies.mixed_precision import Precision, refuse_weights
from runtime.strategies.placement import to_device
from runtime.strategies.unhooked_step import bare_step
from runtime.strategies.unused_parameters import LEAVE_OUT, UnusedParameters

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}


class FSDPStrategy(DDPStrategy):
    """Data parallelism in which the ranks hold the model together.

    Args:
        precision: of forward and backward passes.
        section: the configuration's ``strategy.fsdp``.
        max_grad_value: what elements of the gradient are clamped to, on either side of zero.
        timeout_seconds: longest wait for the other ranks.
    """

    collective_forward = True
    skipping_devices = ()  # whether a gradient is finite is known after a reduction of the shards' norms

    def __init__(
        self,
        *,
        precision: Precision,
        section: FSDPSection,
        max_grad_value: float | None = None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        super().__init__(
            precision=precision,
            options=DDPSection(),
            max_grad_value=max_grad_value,
            timeout_seconds=timeout_seconds,
        )
        self._section = section
        self.state_io: FSDPState = FSDPState(self._scaler, writers=self.world_size)
        if not dist.is_initialized():  # FSDP2 wants a process group, of one process too
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            timeout = timedelta(seconds=timeout_seconds)
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        self._silent = False
        self._used: set[str] = set()
        self._watched: set[nn.Module] = set()
        try:
            self._mesh = self._make_mesh()
        except ConfigurationError:
            self.close()  # the next run in this process may be of another world
            raise

    def place(self, module: TrainingModule) -> TrainingModule:
        """Leave a module on the CPU: its blocks are moved one at a time, and each rank keeps its part."""
        return module

    def prepare(self, module: TrainingModule, optimizer: Optimizer) -> None:
        """Shard module and optimizer. Collective.

        Raises:
            ConfigurationError: the module cannot be sharded in this way.
        """
        refuse_weights(module, scaled=self._scaler is not None, clamped=self._max_grad_value is not None)
        before = optimizer.state_dict()
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.prepare_evaluation(module)
        sharded = dict(module.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[id(parameter)]] for parameter in group["params"]]
        self._optimizer = optimizer
        self.state_io.attach(module, optimizer)
        if before["state"]:  # made for the parameters that are gone
            for member in members(optimizer):
                member.state.clear()
            self.state_io.load_optimizer_state(before)
        self._optimizer_step = bare_step(optimizer)
        self._latecomers = Latecomers(optimizer)
        self._keep_trainable(module)

    def prepare_evaluation(self, module: TrainingModule) -> None:
        """Shard a module. Collective.

        Raises:
            ConfigurationError: it cannot be sharded in this way.
        """
        self._module = module
        self.state_io.attach(module)
        _refuse_scalars(module)
        _refuse_layouts(module)
        # What the whole module returns is looked at and nothing more; of blocks the warning stands (torch 2.13).
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPTrainingModule\) returned a view", UserWarning)
        options: dict[str, Any] = {"mesh": self._mesh, "mp_policy": self._policy(), "offload_policy": self._offload()}
        reshard = self._section.reshard_after_forward
        try:
            for block in self._blocks(module):
                fully_shard(block, reshard_after_forward=reshard, **options)
            fully_shard(module, **options)  # the rest; kept gathered between forward and backward, which follow at once
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise _wrong("wrap", f"the model cannot be sharded so: {error}") from error
        _refuse_mixed_types(module)
        for unit in _units(module):
            _sum_gradients(cast(FSDPModule, unit))
            unit.register_forward_pre_hook(self._watch)
        module.register_forward_hook(_reshard_without_backward)
        self._wrapped = module

    def rewrap(self) -> None:
        """Refuse: what is trainable is fixed when a module is sharded, so the configuration refuses ``model.unfreeze``."""
        raise AssertionError

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surround one forward and backward pass.

        Gradients are reduced in each, or with ``no_sync`` in the last one of a window: that sends less, and keeps a whole
        gradient on each rank meanwhile.
        """
        if self._section.no_sync and self.world_size > 1:
            cast(FSDPModule, self._module).set_requires_gradient_sync(last)
        return nullcontext()

    def forward(self, batch: Any, *, filler: bool) -> Loss:
        """Call the module under autocast.

        A filler's pass runs as any other, since the ranks gather and reduce together; its gradients are replaced by zeros
        where they reach the parameters, whatever the loss is.
        """
        self._silent = filler
        return super().forward(batch, filler=False)

    def unused_parameters(self, batch: Any) -> UnusedParameters | None:
        """Return the parameters that a batch gives no gradient. Collective."""
        self._clear()
        with self.microbatch(last=True):
            self.backward(self.forward(to_device(batch, self.device), filler=False).sum, weight=1.0)
        names = [name for name in self._names if name not in self._used]
        self._clear()
        return UnusedParameters(names, None, f", so these do not train them; {LEAVE_OUT}") if names else None

    def output(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call the model through the whole module, which gathers what lies in no block."""
        return self.unwrapped(ModelCall(positional, dict(named)))

    def _gradients(self) -> list[Tensor]:
        return [local(grad) for p in self._parameters if (grad := p.grad) is not None]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the whole gradient. Collective."""
        squared, unused = torch.zeros(2, dtype=torch.float64, device=self.device).unbind()
        unused += sum(name not in self._used for name in self._names)
        held = [gradient for gradient in gradients if gradient.numel()]
        if held:
            norms = torch.stack(torch._foreach_norm(held))
            squared += norms.double().square().sum().to(self.device)
        sums = torch.stack([squared, unused])
        dist.all_reduce(sums, group=self._mesh.get_group(self._mesh.ndim - 1))
        if self._mesh.ndim > 1:
            dist.all_reduce(unused := sums[1].clone(), group=self._mesh.get_group(0))
        else:
            unused = sums[1]
        if unused.item():
            self._leave_unused_alone()
        return sums[0].sqrt()

    def _leave_unused_alone(self) -> None:
        """Take the gradient away from parameters that no real slot of any rank has used: theirs are zeros, or a filler's.

        Collective.
        """
        uses = torch.tensor([float(name in self._used) for name in self._names], device=self.device)
        dist.all_reduce(uses)
        for parameter, count in zip(self._parameters, uses.tolist(), strict=True):
            if not count:
                parameter.grad = None

    def _clear(self) -> None:
        super()._clear()
        self._used.clear()

    def _clip(self, gradients: list[Tensor], max_grad_norm: float | None, grad_norm: Tensor | None) -> None:
        if max_grad_norm is not None and grad_norm is not None:
            # As torch's clip_grads_with_norm_ does it, which does not take a shard and a number of all ranks together.
            factor = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient))
        elif self._max_grad_value is not None:
            for gradient in gradients:
                gradient.clamp_(-self._max_grad_value, self._max_grad_value)

    def _make_mesh(self) -> DeviceMesh:
        replicas = self._section.replicas
        if self.world_size % replicas or (replicas > 1 and replicas == self.world_size):
            raise _wrong(
                "replicas",
                f"{replicas} replicas of a sharded model need a multiple of {replicas} processes, and more than one each; "
                f"there are {self.world_size}"
                + (" (strategy.kind: ddp is that)" if replicas == self.world_size else ""),
            )
        if replicas == 1:
            return init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("shard",))
        shape = (replicas, self.world_size // replicas)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def _blocks(self, module: nn.Module) -> list[nn.Module]:
        if self._section.min_parameters is not None:
            return blocks_of_size(module, self._section.min_parameters)
        try:
            return blocks_of_classes(module, self._section.wrap)
        except ComponentError as error:
            raise _wrong("wrap", str(error)) from error

    def _policy(self) -> MixedPrecisionPolicy:
        section = self._section.mixed_precision
        if section is None:
            return MixedPrecisionPolicy()
        # Inputs are left to autocast, which casts what each operation wants.
        return MixedPrecisionPolicy(
            param_dtype=_DTYPES[section.parameters], reduce_dtype=_DTYPES[section.gradients], cast_forward_inputs=False
        )

    def _offload(self) -> OffloadPolicy:
        if not self._section.cpu_offload:
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.device.type == "cuda")

    def _watch(self, unit: nn.Module, arguments: Any) -> None:
        """Hook the gathered parameters of a unit, which are the same objects from its first forward pass on."""
        if unit in self._watched:
            return
        self._watched.add(unit)
        names = {id(parameter): name for name, parameter in self.unwrapped.named_parameters()}
        for parameter in unit.parameters():
            if parameter.requires_grad and local(parameter) is parameter:
                name = names[id(parameter)].removeprefix("model.")
                parameter.register_hook(partial(self._noted, name))  # type: ignore[no-untyped-call]

    def _noted(self, name: str, gradient: Tensor) -> Tensor:
        """Note that a real slot used a parameter; turn a filler's gradient into zeros."""
        if self._silent:
            return torch.zeros_like(gradient)
        self._used.add(name)
        return gradient


def _units(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _sum_gradients(unit: FSDPModule) -> None:
    """Let gradients be summed over the ranks, as :mod:`runtime.strategies.reduction` says, and of all parameters on each rank.

    By itself FSDP2 leaves out those that have none on a rank, and what the ranks send no longer fits together.
    """
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
    if hasattr(unit, "set_reduce_scatter_unused_params"):  # not in torch 2.11
        unit.set_reduce_scatter_unused_params(True)


def _reshard_without_backward(module: nn.Module, arguments: Any, output: Any) -> None:
    """Let go of what was gathered for a forward pass that no backward pass follows: the weights may change before the next."""
    if not torch.is_grad_enabled():
        for unit in _units(module):
            cast(FSDPModule, unit).reshard()


def _refuse_scalars(module: nn.Module) -> None:
    names = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if names:
        raise _wrong(
            "wrap", f"{', '.join(names)}: a parameter without dimensions cannot be cut; give it the shape (1,)"
        )


def _refuse_mixed_types(module: nn.Module) -> None:
    """Refuse units whose parameters have several types: FSDP2 puts a unit's parameters into one buffer (torch 2.13)."""
    units = set(_units(module))
    for unit in units:
        inner = {id(p) for other in unit.modules() if other in units and other is not unit for p in other.parameters()}
        first = {p.dtype: name for name, p in reversed(list(unit.named_parameters())) if id(p) not in inner}
        if len(first) > 1:
            found = ", ".join(
                f"{name} ({str(dtype).removeprefix('torch.')})" for dtype, name in reversed(first.items())
            )
            what = (
                f"fsdp takes parameters of one type in each sharded part, and {type(unit).__name__} has {found}: build it in "
                "one type, or use strategy.kind: ddp"
            )
            raise ConfigurationError([Problem("configuration", "strategy.kind", what)])


def _refuse_layouts(module: nn.Module) -> None:
    other = [(name, p) for name, p in module.named_parameters() if not p.is_contiguous()]
    if not other:
        return
    name, parameter = other[0]
    more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
    raise ConfigurationError(
        [
            Problem(
                "configuration",
                "strategy.kind",
                f"fsdp takes contiguous parameters only, and {name.removeprefix('model.')}{more} has strides "
                f"{tuple(parameter.stride())} for shape {tuple(parameter.shape)} (channels_last, or a transposed weight): use "
                "strategy.kind: ddp, or build the model without memory_format and with .contiguous() weights",
            )
        ]
    )


def _wrong(key: str, what: str) -> ConfigurationError:
    return ConfigurationError([Problem("configuration", f"strategy.fsdp.{key}", what)])
