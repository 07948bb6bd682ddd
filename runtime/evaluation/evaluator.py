"""Exact evaluation: every sample once on any number of ranks; sums, never means of means.

The microbatches depend only on the size of the data. Each rank runs a consecutive share of them, in the same number of rounds
on every rank. Only the metrics' states stay in memory, never the model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.data.batches import slots_of_rank
from runtime.data.loading import MakeLoader, read
from runtime.data.samples import Samples, SlotIndex
from runtime.data.stream_rounds import evaluation_rounds
from runtime.data.streams import StreamSamples
from runtime.distributed.collectives import StopConsensus, sum_by_name, sum_over_ranks
from runtime.errors import EvaluationError
from runtime.evaluation.metrics import MetricSet, Result
from runtime.losses.rows import row_mismatch
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything
from runtime.state.module_buffers import preserved_buffers
from runtime.strategies import Strategy
from runtime.strategies.placement import to_device

_HELD = 64
_WEIGHT = "weight/"  # no loss may be called "weight"


class TrialBatch(NamedTuple):
    """One microbatch that was run through model, loss and metrics.

    Args:
        batch: on its device; None if a stream had none for this rank.
        output: the output that the objective passes to metrics.
        parts: names under which the loss and its parts are reported; empty without a batch.
        metrics: copies of the evaluator's, updated with this microbatch only.
    """

    batch: Any
    output: Any
    parts: tuple[str, ...]
    metrics: MetricSet


class Evaluator:
    """Evaluates one split.

    Args:
        split: its name, for messages.
        samples: the data.
        micro_size: samples in one forward pass.
        metrics: computed in addition to the loss.
        seed: of the run; a model that draws random numbers draws the same ones in every evaluation.
    """

    def __init__(
        self,
        split: str,
        samples: Samples | StreamSamples,
        *,
        micro_size: int,
        strategy: Strategy,
        metrics: MetricSet,
        make_loader: Callable[..., Any],
        seed: int,
    ) -> None:
        self._split = split
        self._samples = samples
        self._micro_size = micro_size
        self._strategy = strategy
        self._metrics = metrics
        self._make_loader = make_loader
        self._seed = seed
        self._started_rounds: Iterator[tuple[int, int, Any] | None] | None = None

    @torch.no_grad()
    def try_first(self, make_loader: MakeLoader) -> TrialBatch:
        """Run the first microbatch through model, loss and metrics; for map-style data it is the same on every rank.

        The next evaluation still evaluates what was read from a stream. The caller restores random state, modes and buffers.
        Collective if data is streamed or the strategy's forward passes are collective.

        Args:
            make_loader: for map-style data.
        """
        strategy, metrics = self._strategy, deepcopy(self._metrics)
        metrics.reset()
        first = self._first(make_loader)
        if first is None:
            return TrialBatch(None, None, (), metrics)
        number, count, batch = first
        objective = strategy.unwrapped.objective
        weight = objective.checked_weight(batch, count)
        seed_everything(derive(self._seed, Purpose.EVALUATION, 0, number), strategy.device)
        batch = to_device(batch, strategy.device)
        with strategy.autocast():
            loss = strategy.unwrapped(batch)
        metrics.update(objective, loss.output, batch)
        sums = loss.parts if loss.sum.ndim else {"loss": loss.sum, **loss.parts}
        return TrialBatch(batch, loss.output, tuple(objective.means(dict.fromkeys(sums, 0.0), weight)), metrics)

    def _first(self, make_loader: MakeLoader) -> tuple[int, int, Any] | None:
        if not isinstance(self._samples, StreamSamples):
            share = self._share(0, len(self._samples))
            return 0, len(share.ids), next(read(self._samples, iter([share]), make_loader))
        if self._strategy.collective_forward:
            return None  # a rank may have no microbatch, and the others would wait for its forward pass
        rounds = self._rounds()
        first = next(rounds, None)
        self._started_rounds = chain([first], rounds)
        return first

    @torch.no_grad()
    def evaluate(self, stop_requested: Callable[[], bool] = lambda: False) -> dict[str, Result] | None:
        """Return ``samples``, ``loss``, the objective's parts and the metrics, equal on every rank.

        None if a rank requested a stop, after the same round on every rank.
        Collective: every rank must call this.

        Raises:
            EvaluationError: not every sample was evaluated once, or a metric refused its input.
        """
        module = self._strategy.unwrapped
        was_training = module.training
        module.eval()
        self._metrics.reset(None if isinstance(self._samples, StreamSamples) else self._own(len(self._samples)))
        try:
            # A module may update buffers in evaluation mode too, and each rank would see only a part of the data.
            with preserved_random_state(self._strategy.device), preserved_buffers(module):
                terms = self._run_share(stop_requested)
        finally:
            module.train(was_training)
        return self._reduced(terms) if terms is not None else None

    def _run_share(self, stop_requested: Callable[[], bool]) -> dict[str, list[float]] | None:
        strategy, device = self._strategy, self._strategy.device
        objective = strategy.unwrapped.objective
        stop_consensus = StopConsensus(world_size=strategy.world_size, device=device)
        terms: dict[str, list[Any]] = {"samples": []}
        placeholder: Any = None  # an earlier batch, on its device
        rounds, self._started_rounds = self._started_rounds or self._rounds(), None
        for microbatch in rounds:  # the same number on every rank
            stop_consensus.begin(stop_requested())
            if stop_consensus.end():
                return None
            if microbatch is None:
                self._run_placeholder(placeholder)
                continue
            number, count, batch = microbatch
            terms["samples"].append(count)
            if count and self._samples.own_batches:
                row_mismatch(objective, batch, count)
            if count:
                weight = objective.checked_weight(batch, count)
                for place, part in enumerate(weight if isinstance(weight, tuple) else (weight,)):
                    terms.setdefault(f"{_WEIGHT}{place}", []).append(part)
            seed_everything(derive(self._seed, Purpose.EVALUATION, 0, number), device)
            batch = to_device(batch, strategy.device)
            placeholder = batch if strategy.collective_forward else None
            if not count:  # placeholder batch: this rank has no microbatch
                self._run_placeholder(batch)
                continue
            with strategy.autocast():
                loss = strategy.unwrapped(batch)
            # Of an objective with several sums, each is also a part by itself.
            sums = loss.parts if loss.sum.ndim else {"loss": loss.sum, **loss.parts}
            for name, part in sums.items():
                _hold(terms.setdefault(name, []), part)
            if self._metrics:
                self._metrics.update(objective, loss.output, batch, number=number)
        # Synchronises with the device: an evaluation is over when its sums are read.
        return {name: _floats(values) for name, values in terms.items()}

    def _rounds(self) -> Iterator[tuple[int, int, Any] | None]:
        """Yield once per round a microbatch's number, number of samples and batch, or None if this rank has none."""
        strategy = self._strategy
        if isinstance(self._samples, StreamSamples):
            yield from evaluation_rounds(
                self._samples,
                world_size=strategy.world_size,
                rank=strategy.rank,
                make_loader=self._make_loader,
                sum_over_ranks=lambda flags: sum_over_ranks(flags, strategy.device),
            )
            return
        size = len(self._samples)
        microbatches, own = -(-size // self._micro_size), self._own(size)
        if not own and strategy.collective_forward:
            yield from self._placeholders(self._samples, rounds=-(-microbatches // strategy.world_size))
            return
        batches = read(self._samples, (self._share(number, size) for number in own), self._make_loader)
        for n in range(-(-microbatches // strategy.world_size)):
            yield (own[n], len(self._share(own[n], size).ids), next(batches)) if n < len(own) else None

    def _own(self, size: int) -> range:
        """Return the numbers of this rank's microbatches."""
        return slots_of_rank(-(-size // self._micro_size), self._strategy.world_size, self._strategy.rank)

    def _placeholders(self, samples: Samples, *, rounds: int) -> Iterator[tuple[int, int, Any]]:
        """Yield the first microbatch in every round, counted as no samples, for a rank without microbatches."""
        first = self._share(0, len(samples))
        for batch in read(samples, (first for _ in range(rounds)), self._make_loader):
            yield 0, 0, batch

    def _run_placeholder(self, batch: Any) -> None:
        """Run a forward pass whose result is discarded, if the strategy's forward passes are collective.

        Raises:
            EvaluationError: there is no batch to run.
        """
        strategy = self._strategy
        if not strategy.collective_forward:
            return
        if batch is None:
            raise EvaluationError(
                f"{self._split}: the stream has fewer microbatches than there are processes, and with this strategy.kind each "
                "process needs one; lower evaluation.micro_size, or use fewer processes"
            )
        with strategy.autocast():
            strategy.unwrapped(batch)

    def _share(self, number: int, size: int) -> SlotIndex:
        start = number * self._micro_size
        return SlotIndex(0, np.arange(start, min(start + self._micro_size, size), dtype=np.int64))

    def _reduced(self, terms: dict[str, list[float]]) -> dict[str, Result]:
        summed = sum_by_name(terms, self._strategy.device)
        samples = int(summed.pop("samples"))
        objective = self._strategy.unwrapped.objective
        weights = tuple(summed.pop(f"{_WEIGHT}{number}", 0.0) for number in range(objective.num_weights or 1))
        if not isinstance(self._samples, StreamSamples) and samples != len(self._samples):
            raise EvaluationError(
                f"{self._split}: {samples} samples were evaluated, the data set has {len(self._samples)}"
            )
        if not any(weights):
            raise EvaluationError(f"{self._split}: no sample carries weight, so there is no mean loss")
        means = objective.means(summed, weights[0] if objective.num_weights is None else weights)
        return {"samples": float(samples), **means, **self._metrics.compute()}


def _hold(held: list[Tensor], value: Tensor) -> None:
    """Append a number, and join many numbers into one tensor: on a GPU each tensor takes half a KiB."""
    held.append(value.double().reshape(1))
    if len(held) >= _HELD and held[-_HELD].numel() == 1:
        held[-_HELD:] = [torch.cat(held[-_HELD:])]


def _floats(values: list[Any]) -> list[float]:
    """Return numbers, some of which may be tensors on a device, as floats; waits for the device once."""
    if not values or not isinstance(values[0], Tensor):
        return values
    floats: list[float] = torch.cat(values).tolist()
    return floats
