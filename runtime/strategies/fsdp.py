"""FSDP2: every rank holds a shard of each parameter, its gradient and its optimizer state.

Blocks are gathered one at a time for their forward and backward pass. Accelerate creates the process group and chooses the
device, as for DDP; sharding is torch's ``fully_shard``. Accelerate's plugin (1.15) is not used: on CPUs it silently falls back
to plain DDP, it cannot shard on one process, its size-based policy wraps containers that torch refuses, and an optimizer that
creates its state eagerly (Adagrad) keeps that of the replaced parameters.
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
from runtime.strategies.finite import clip_to_norm
from runtime.strategies.fsdp_state import FSDPState
from runtime.strategies.fsdp_tensors import local
from runtime.strategies.mixed_precision import Precision, refuse_weights
from runtime.strategies.placement import to_device
from runtime.strategies.unhooked_step import unhooked_step
from runtime.strategies.unused_parameters import LEAVE_OUT, UnusedParameters

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}


class FSDPStrategy(DDPStrategy):
    """Data parallelism in which each rank holds a shard of the model.

    Args:
        precision: of forward and backward passes.
        section: the configuration's ``strategy.fsdp``.
        max_grad_value: gradient elements are clamped to plus or minus this value; None does not clamp.
        timeout_seconds: for the rendezvous and for each collective.
    """

    collective_forward = True
    skipping_devices = ()  # the check for finite gradients needs a reduction of the shards' norms

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
        if not dist.is_initialized():  # FSDP2 needs a process group even for one process
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            timeout = timedelta(seconds=timeout_seconds)
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        self._in_filler = False
        self._used: set[str] = set()
        self._hooked: set[nn.Module] = set()
        try:
            self._mesh = self._make_mesh()
        except ConfigurationError:
            self.close()  # the next run in this process may have another world size
            raise

    def place(self, module: TrainingModule) -> TrainingModule:
        """Leave a module on the CPU: its blocks are moved one at a time, and each rank keeps its shard."""
        return module

    def prepare(self, module: TrainingModule, optimizer: Optimizer, *, slots: int) -> None:
        """Shard module and optimizer. Collective.

        Raises:
            ConfigurationError: the module cannot be sharded as configured.
        """
        self.slot_reduction = self._reduction(slots)
        refuse_weights(module, scaled=self._scaler is not None, clamped=self._max_grad_value is not None)
        before = optimizer.state_dict()
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.prepare_evaluation(module)
        sharded = dict(module.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[id(parameter)]] for parameter in group["params"]]
        self._optimizer = optimizer
        self.state_io.attach(module, optimizer)
        if before["state"]:  # created eagerly, for the parameters that were replaced
            for member in members(optimizer):
                member.state.clear()
            self.state_io.load_optimizer_state(before)
        self._optimizer_step = unhooked_step(optimizer)
        self._latecomers = Latecomers(optimizer)
        self._collect_trainable(module)

    def prepare_evaluation(self, module: TrainingModule) -> None:
        """Shard a module. Collective.

        Raises:
            ConfigurationError: the module cannot be sharded as configured.
        """
        self._module = module
        self.state_io.attach(module)
        _refuse_scalars(module)
        _refuse_layouts(module)
        # The root module's output is only read, never modified in place; for blocks the warning stays (torch 2.13).
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPTrainingModule\) returned a view", UserWarning)
        options: dict[str, Any] = {"mesh": self._mesh, "mp_policy": self._policy(), "offload_policy": self._offload()}
        reshard = self._section.reshard_after_forward
        try:
            for block in self._blocks(module):
                fully_shard(block, reshard_after_forward=reshard, **options)
            fully_shard(module, **options)  # the rest; stays gathered, since backward follows forward immediately
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise _error("wrap", f"the model cannot be sharded in these blocks: {error}") from error
        _refuse_mixed_types(module)
        for unit in _units(module):
            _sum_gradients(cast(FSDPModule, unit))
            unit.register_forward_pre_hook(self._hook_parameters)
        module.register_forward_hook(_reshard_without_backward)
        self._wrapped = module

    def rewrap(self) -> None:
        """Not supported: trainability is fixed when a module is sharded, so the configuration refuses ``model.unfreeze``."""
        raise AssertionError

    def microbatch(self, *, slot: int, last: bool) -> AbstractContextManager[None]:
        """Return a context for one forward and backward pass.

        Gradients are reduced in each pass, or with ``no_sync`` in a window's last one: that sends less, but keeps an unsharded
        gradient on each rank until then.
        """
        if self._section.no_sync and self.world_size > 1:
            cast(FSDPModule, self._module).set_requires_gradient_sync(last)
        return nullcontext()

    def forward(self, batch: Any, *, filler: bool) -> Loss:
        """Call the module under autocast. Collective.

        A filler runs a real pass, since gathering and reduction are collective; its gradients are replaced by zeros where they
        reach the parameters, whatever the loss is.
        """
        self._in_filler = filler
        return super().forward(batch, filler=False)

    def unused_parameters(self, batch: Any) -> UnusedParameters | None:
        """Return the parameters that a batch gives no gradient. Collective."""
        self._clear()
        with self.microbatch(slot=-1, last=True):
            self.backward(self.forward(to_device(batch, self.device), filler=False).sum, weight=1.0)
        names = [name for name in self._names if name not in self._used]
        self._clear()
        return UnusedParameters(names, None, f", so these do not train them; {LEAVE_OUT}") if names else None

    def output(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call the model through the root module, which gathers parameters outside the blocks. Collective."""
        return self.unwrapped(ModelCall(positional, dict(named)))

    def _gradients(self) -> list[Tensor]:
        return [local(grad) for p in self._parameters if (grad := p.grad) is not None]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the whole gradient. Collective."""
        squares = self._squares(gradients)
        unused = squares.new_tensor([sum(name not in self._used for name in self._names)])
        sums = torch.cat([squares, unused])
        dist.all_reduce(sums, group=self._mesh.get_group(self._mesh.ndim - 1))
        unused = sums[-1:]
        if self._mesh.ndim > 1:
            unused = unused.clone()
            dist.all_reduce(unused, group=self._mesh.get_group(0))
        if unused.item():
            self._drop_unused_gradients()
        return sums[:-1].sum().sqrt()

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        """Return sums of squares in float64, whose sum over the ranks of a replica is the gradient's."""
        squared = torch.zeros(1, dtype=torch.float64, device=self.device)
        held = [gradient for gradient in gradients if gradient.numel()]
        if held:
            norms = torch.stack(torch._foreach_norm(held))
            squared += norms.double().square().sum().to(self.device)
        return squared

    def _drop_unused_gradients(self) -> None:
        """Drop the gradients (zeros) of parameters that no real slot of any rank used. Collective."""
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
            clip_to_norm(gradients, max_grad_norm, grad_norm)
        elif self._max_grad_value is not None:
            for gradient in gradients:
                gradient.clamp_(-self._max_grad_value, self._max_grad_value)

    def _make_mesh(self) -> DeviceMesh:
        replicas = self._section.replicas
        if self.world_size % replicas or (replicas > 1 and replicas == self.world_size):
            raise _error(
                "replicas",
                f"{replicas} replicas of a sharded model need a multiple of {replicas} processes, and more than one each; "
                f"there are {self.world_size}"
                + (" (for one process per replica, use strategy.kind: ddp)" if replicas == self.world_size else ""),
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
            raise _error("wrap", str(error)) from error

    def _policy(self) -> MixedPrecisionPolicy:
        section = self._section.mixed_precision
        if section is None:
            return MixedPrecisionPolicy()
        # Inputs are left to autocast, which casts per operation.
        return MixedPrecisionPolicy(
            param_dtype=_DTYPES[section.parameters], reduce_dtype=_DTYPES[section.gradients], cast_forward_inputs=False
        )

    def _offload(self) -> OffloadPolicy:
        if not self._section.cpu_offload:
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.device.type == "cuda")

    def _hook_parameters(self, unit: nn.Module, arguments: Any) -> None:
        """Hook the gathered parameters of a unit, which are the same objects from its first forward pass on."""
        if unit in self._hooked:
            return
        self._hooked.add(unit)
        names = {id(parameter): name for name, parameter in self.unwrapped.named_parameters()}
        for parameter in unit.parameters():
            if parameter.requires_grad and local(parameter) is parameter:
                name = names[id(parameter)].removeprefix("model.")
                parameter.register_hook(partial(self._record_use, name))  # type: ignore[no-untyped-call]

    def _record_use(self, name: str, gradient: Tensor) -> Tensor:
        """Record that a real slot used a parameter; replace a filler's gradient by zeros."""
        if self._in_filler:
            return torch.zeros_like(gradient)
        self._used.add(name)
        return gradient


def _units(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _sum_gradients(unit: FSDPModule) -> None:
    """Sum gradients over the ranks instead of averaging (why: :mod:`runtime.strategies.reduction`), unused parameters included.

    By default FSDP2 leaves out parameters without a gradient on a rank, and the ranks' reductions no longer match.
    """
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
    if hasattr(unit, "set_reduce_scatter_unused_params"):  # not in torch 2.11
        unit.set_reduce_scatter_unused_params(True)


def _reshard_without_backward(module: nn.Module, arguments: Any, output: Any) -> None:
    """Free gathered parameters after a forward pass without backward: the weights may change before the next pass."""
    if not torch.is_grad_enabled():
        for unit in _units(module):
            cast(FSDPModule, unit).reshard()


def _refuse_scalars(module: nn.Module) -> None:
    names = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if names:
        raise _error("wrap", f"{', '.join(names)}: a scalar parameter cannot be sharded; give it the shape (1,)")


def _refuse_mixed_types(module: nn.Module) -> None:
    """Refuse units whose parameters have several dtypes: FSDP2 puts a unit's parameters into one buffer (torch 2.13)."""
    units = set(_units(module))
    for unit in units:
        inner = {id(p) for other in unit.modules() if other in units and other is not unit for p in other.parameters()}
        first = {p.dtype: name for name, p in reversed(list(unit.named_parameters())) if id(p) not in inner}
        if len(first) > 1:
            examples = ", ".join(
                f"{name} ({str(dtype).removeprefix('torch.')})" for dtype, name in reversed(first.items())
            )
            what = (
                f"fsdp needs parameters of one dtype in each sharded block, but {type(unit).__name__} has {examples}: use one "
                "dtype, or strategy.kind: ddp"
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
                f"fsdp supports contiguous parameters only, but {name.removeprefix('model.')}{more} has strides "
                f"{tuple(parameter.stride())} for shape {tuple(parameter.shape)} (channels_last, or a transposed weight): use "
                "strategy.kind: ddp, or build the model without memory_format and with .contiguous() weights",
            )
        ]
    )


def _error(key: str, what: str) -> ConfigurationError:
    return ConfigurationError([Problem("configuration", f"strategy.fsdp.{key}", what)])
