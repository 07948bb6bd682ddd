"""Builds the parts of a run from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from runtime.build import samples as building
from runtime.build.component import Component
from runtime.build.components import Components
from runtime.build.metrics import build_metrics
from runtime.build.model import build_model, load_pretrained, rebuild_blocks
from runtime.build.objective import build_objective
from runtime.build.optimizer import build_freezing, build_optimizer
from runtime.build.orders import ValueReader, build_order
from runtime.build.schedule import ScheduleBuilder
from runtime.build.sources import SPLITS, DataSources, split_key, split_section
from runtime.checkpoints.pretrained import WeightsReport
from runtime.config.file import LoadedConfiguration
from runtime.config.zero_json import generate
from runtime.data.fields import Fields
from runtime.data.loading import MakeLoader
from runtime.data.order import Order
from runtime.data.samples import Samples
from runtime.data.streams import StreamSamples
from runtime.data.training_data import MappedData, StreamedData, TrainingData
from runtime.objective import Objective, TrainingModule
from runtime.optimization.averaging import WeightAverage
from runtime.optimization.freezing import Freezing
from runtime.strategies import Strategy
from runtime.strategies.memory import state_bytes
from runtime.strategies.state_size import StateBytes

if TYPE_CHECKING:
    from torchmetrics import Metric


class Builder:
    """Builds the parts of one run. Each call builds a new model, optimizer or metric; data sets are built once.

    Args:
        loaded: the checked configuration.
        stored: a checkpoint's :attr:`DataSources.preparation`, in place of the training data.

    Attributes:
        values: the sections.
        where: where each key was written.
        code: the folder of the user's own modules.
        components: the components, by key.
        sources: the data sets.
        schedule: builds the schedule.
    """

    def __init__(self, loaded: LoadedConfiguration, *, stored: Mapping[str, Any] | None = None) -> None:
        values = self.values = loaded.values
        self.where, self.code = loaded.where, loaded.code
        self.components = Components(values, code=loaded.code, where=loaded.where)
        self._reader = ValueReader(self.components.of, self.where)
        first = next(iter(values.objective.losses.values()), None)
        loss_target = first.fields.target if first is not None else None
        self._target = values.data.fields.target if loss_target is None else loss_target
        readers = {name: self.components.find(*split_key(name)) for name in SPLITS}
        self.sources = DataSources(
            values.data,
            {name: reader for name, reader in readers.items() if reader is not None},
            self._reader,
            seed=values.seed,
            target=self._target,
            stored=stored,
        )
        self.schedule = ScheduleBuilder(
            values.schedule, self.components.find("schedule"), values.averaging, values.limit, self.where
        )

    def model(self) -> nn.Module:
        """Build the model on the CPU under the run's seed, so that it is the same on every rank."""
        return build_model(self.components.of("model"), seed=self.values.seed)

    def pretrained(self, model: nn.Module) -> WeightsReport | None:
        """Load the pretrained weights, if any, and return a report of what was loaded."""
        return load_pretrained(model, self.values.model.weights, self.where)

    def rebuild_blocks(self, model: nn.Module) -> None:
        """Apply activation checkpointing and torch.compile to a model or its blocks, as configured."""
        values = self.values
        rebuild_blocks(
            model,
            recomputed=values.model.checkpoint_activations,
            wrapped=values.strategy.fsdp.wrap,
            compiled=values.compile,
            where=self.where,
        )

    def objective(self) -> Objective:
        """Build the objective under the run's seed."""
        single, losses = self.components.find("objective"), self.components.below("objective", "losses")
        fields = Fields(**self.values.data.fields.model_dump(), output=self.values.model.output)
        return build_objective(single, losses, fields=fields, seed=self.values.seed)

    def optimizer(self, module: nn.Module) -> Optimizer:
        """Build the optimizer over a module's trainable parameters."""
        averages = self.values.averaging is not None
        exact = self.values.determinism == "exact"
        return build_optimizer(self.components.of("optimizer"), module, averages=averages, exact=exact)

    def freezing(self, module: TrainingModule) -> Freezing:
        """Build the freezing of parameters, without applying it."""
        return build_freezing(self.values.model, module, self.where)

    def averaging(self, strategy: Strategy) -> WeightAverage | None:
        """Build the running average of a prepared module's weights, or None if none is configured."""
        section = self.values.averaging
        return WeightAverage(strategy.unwrapped, section, strategy.state_io.weights()) if section is not None else None

    def metrics(self) -> dict[str, Metric]:
        """Build the metrics; each call makes new ones."""
        return build_metrics(
            self.components.below("evaluation", "metrics"),
            class_names=self.values.evaluation.class_names,
            has_groups=self.values.data.fields.group is not None,
            where=self.where,
        )

    def state_bytes(self, module: nn.Module, optimizer: Optimizer, world_size: int) -> StateBytes:
        """Return how many bytes of state each of the processes will hold of a module that was not prepared."""
        values = self.values
        return state_bytes(
            values.strategy, module, optimizer, world_size, zero_json=lambda: generate(values, self.where.beside)
        )

    def evaluation_micro_size(self, slots: int) -> int:
        """Return the number of samples of one forward pass in evaluation and prediction.

        Args:
            slots: K.
        """
        return self.values.evaluation.micro_size or -(-self.values.batch.global_size // slots)

    def samples(self, name: str, *, batch_size: int, training: bool = False) -> Samples | StreamSamples | None:
        """Build one split's samples, or None if it is not configured.

        Args:
            batch_size: of a stream: items that are batched together; ignored for one that yields batches and is not trained on.
            training: whether it is trained on.
        """
        source = self.sources.get(name)
        if source is None:
            return None
        values, data = self.values, self.values.data
        section = split_section(name, data, values.prediction)
        key = split_key(name) if section is not None else ("data", "split")
        if section is not None and section.sharded_by == "dataset" and name != "train":
            what = "must be runtime here: each sample is evaluated once, on any number of ranks"
            raise self.where.error((*key, "sharded_by"), what)
        samples = building.build_samples(
            source,
            section,
            transform=self.components.find(*key, "transform"),
            collate=self.components.find("data", "collate"),
            fields=Fields(**(data.fields.model_dump() | {"target": self._target})),
            seed=values.seed,
            batch_size=batch_size,
            drop_last=data.drop_last and training,
            one_batch_each=not training,
        )
        if isinstance(samples, StreamSamples):
            samples.may_differ = bool(values.resume.allow_changes) or values.checks == "off"
        return samples

    @property
    def sampler(self) -> Component | None:
        """The sampler of single samples or of batches, or None."""
        return self.components.find("data", "sampler") or self.components.find("data", "batch_sampler")

    def order(self, source: Any) -> Order:
        """Build the order of the training samples."""
        return build_order(
            self.values.data,
            source,
            batch_size=self.values.batch.global_size,
            seed=self.values.seed,
            sampler=self.sampler,
            reader=self._reader,
        )

    def training_data(self) -> TrainingData:
        """Build the training data in its order."""
        samples = self.samples("train", batch_size=self.values.batch.global_size, training=True)
        assert samples is not None
        if isinstance(samples, Samples):
            return MappedData(samples, self.order(samples.source))
        name = building.order_of_stream(self.values.data)
        if name is not None:
            what = "does not apply to a stream, which sets its own order; shuffle in the data set and leave this out"
            raise self.where.error(("data", name), what)
        return StreamedData(samples)

    def loader(
        self,
        device: torch.device,
        closing: ExitStack | None = None,
        *,
        workers: int | None = None,
        few: bool = False,
    ) -> MakeLoader:
        """Return a factory of loaders; memory is pinned by default if there is a GPU.

        Args:
            closing: keeps workers alive until it is closed, for data that is read repeatedly.
            workers: how many to start. Default: as configured.
            few: only a few samples are read: start at most one worker.
        """
        section = self.values.data.loader
        return building.build_loader(
            section,
            self.components.find("data", "loader", "worker_init"),
            device,
            closing,
            workers=min(1, section.num_workers) if few else workers,
        )
