"""The section of the zero strategy: DeepSpeed's sharding of optimizer state, gradients and parameters over processes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from runtime.config.types import Section, Shorthand, free, refuse


class OffloadSection(Section):
    """Where a part of the training state is kept while not in use; the device may be written alone."""

    device: Literal["cpu", "nvme"]
    """``cpu``: host memory; ``nvme``: a fast disk, through DeepSpeed's asynchronous reads and writes."""
    path: str | None = None
    """``nvme``: the folder on that disk."""
    pin_memory: bool = False
    """``cpu``: page-locked memory, for faster copies."""

    @model_validator(mode="after")
    def _has_a_place(self) -> Self:
        nvme = self.device == "nvme"
        return refuse(
            self,
            (
                nvme and self.path is None,
                "path",
                "nvme needs the folder on the disk: {device: nvme, path: /local/nvme}",
            ),
            (not nvme and self.path is not None, "path", "belongs to device: nvme"),
            (nvme and self.pin_memory, "pin_memory", "belongs to device: cpu"),
        )


_DEVICE_ALONE = Shorthand(
    lambda value: {"device": value} if isinstance(value, str) else value, {"enum": ["cpu", "nvme"]}
)


class ZeroSection(Section):
    """DeepSpeed's ZeRO (Rajbhandari et al., "ZeRO", 2020), through the package deepspeed."""

    stage: int = Field(2, json_schema_extra={"resume": "free", "enum": [1, 2, 3]})
    """What is sharded. ``1``: optimizer state; ``2``: also gradients; ``3``: also parameters, which each forward and backward
    pass gathers."""
    offload_optimizer: Annotated[OffloadSection | None, _DEVICE_ALONE] = free(None)
    """Keep optimizer state (and the float32 weights) off the GPU, and update there. Default: on the GPU."""
    offload_parameters: Annotated[OffloadSection | None, _DEVICE_ALONE] = free(None)
    """Stage 3: keep the parameters off the GPU. Default: on the GPU."""
    extra: dict[str, Any] = free({})
    """Additional DeepSpeed JSON, as in ``{zero_optimization: {reduce_bucket_size: 50000000}}``."""
    file: str | None = free(None)
    """A DeepSpeed JSON file, relative to the YAML. It must not contradict the YAML, which sets the values of ``auto``."""

    @model_validator(mode="after")
    def _does_what_is_asked(self) -> Self:
        optimizer, parameters = self.offload_optimizer, self.offload_parameters
        return refuse(
            self,
            (
                self.stage == 0,
                "stage",
                "0 shards nothing, applies non-finite gradients and computes no norm: use strategy.kind: ddp, which is exact",
            ),
            (self.stage not in (0, 1, 2, 3), "stage", f"there is no stage {self.stage}; use 1, 2 or 3"),
            (
                parameters and self.stage != 3,
                "offload_parameters",
                f"stage {self.stage} keeps all parameters on every device; only stage 3 can offload them",
            ),
            (
                optimizer and optimizer.device == "nvme" and self.stage != 3,
                "offload_optimizer",
                f"stage {self.stage} offloads to cpu only; nvme needs stage 3",
            ),
        )
