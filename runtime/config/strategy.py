"""The configuration's sections on distribution strategies and torch.compile. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from runtime.config.types import Section, free, refuse
from runtime.config.zero import ZeroSection


class CompileSection(Section):
    """torch.compile of the model. Off unless this section is given; ``compile: true`` uses the defaults."""

    blocks: list[str] = []
    """Classes of blocks that are compiled separately; equal blocks share their code. Default: the model as a whole."""
    backend: str = "inductor"
    """Compiler backend."""
    mode: str | None = None
    """Preset of the backend, such as ``max-autotune``."""
    dynamic: bool | None = None
    """Compile for dynamic shapes. Default: torch decides."""
    fullgraph: bool = False
    """Raise an error on graph breaks."""


StrategyKind = Literal["ddp", "fsdp", "zero"]


class DDPSection(Section):
    """Options of torch's DistributedDataParallel."""

    bucket_mb: float = Field(25.0, gt=0)
    """Size of the gradient buckets, in MiB."""
    static_graph: bool = free(False)
    """The graph is the same at every step; lets DDP reorder and allows re-entrant checkpointing."""
    find_unused_parameters: bool = free(False)
    """Search each forward pass for parameters without a gradient, which are then not updated. Needed on several processes if
    some step does not use every parameter; the result is that of one process."""
    gradient_as_bucket_view: bool = free(True)
    """Gradients are views of the buckets: less memory, one copy fewer."""
    communication_hook: Literal["fp16", "bf16"] | None = None
    """Send gradients in half precision. Inexact: the sum is rounded."""

    @model_validator(mode="after")
    def _static_or_searched(self) -> Self:
        both = self.static_graph and self.find_unused_parameters
        return refuse(
            self, (both, "find_unused_parameters", "a static graph needs no search; leave one of the two out")
        )


class ShardedPrecisionSection(Section):
    """Types in which sharded parameters and gradients are communicated. Parameters and optimizer state keep their own type."""

    parameters: Literal["bf16", "fp16"]
    """Type of gathered parameters; must be that of ``precision``. Halves communication, and rounds values that autocast would
    not."""
    gradients: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which gradients are summed over the ranks."""


class FSDPSection(Section):
    """Options of FSDP2, torch's fully_shard."""

    wrap: list[str] = free([])
    """Classes of blocks that are gathered one at a time, such as a transformer's layers. Default: the model as one block."""
    min_parameters: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Instead of ``wrap``: blocks are the smallest modules with submodules and at least this many parameters."""
    reshard_after_forward: bool = free(True)
    """Free a block after its forward pass, and gather it again for its backward pass: less memory, more communication."""
    mixed_precision: ShardedPrecisionSection | None = None
    """Types in which parameters and gradients are communicated. Default: their own."""
    cpu_offload: bool = free(False)
    """Keep parameters, gradients and optimizer state in host memory; the optimizer steps there."""
    no_sync: bool = free(False)
    """Reduce gradients once per step rather than per microbatch: less communication, but memory for a whole gradient.
    ``determinism: exact`` always does."""
    replicas: int = Field(1, ge=1, json_schema_extra={"resume": "free"})
    """HSDP: number of process groups that each hold a sharded copy, such as one per host. Must divide the world size."""

    @model_validator(mode="after")
    def _one_kind_of_block(self) -> Self:
        both = self.wrap and self.min_parameters is not None
        return refuse(self, (both, "min_parameters", "give either 'wrap' or 'min_parameters', not both"))


class StrategySection(Section):
    """The distribution strategy."""

    kind: StrategyKind = free("ddp")
    """``ddp``: every process holds the whole model (also with one process). ``fsdp`` and ``zero`` (DeepSpeed): the model is
    sharded over the processes."""
    world_size: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Required number of processes; any other is refused. Default: the number requested from the launcher."""
    ddp: DDPSection = DDPSection()
    """Options of DistributedDataParallel."""
    fsdp: FSDPSection = FSDPSection()
    """Options of FSDP2."""
    zero: ZeroSection = ZeroSection()
    """Options of DeepSpeed's ZeRO."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        others = set(get_args(StrategyKind)) - {self.kind}
        return refuse(
            self,
            *(
                (
                    getattr(self, name) != type(getattr(self, name))(),
                    name,
                    f"is ignored with kind: {self.kind}; leave it out",
                )
                for name in sorted(others)
            ),
        )
