"""Prediction: every sample once and in the data set's order, from any number of ranks, with a bounded number of rows in memory.

The data is cut into the same numbered microbatches as in evaluation, under the same seeds. In each round every rank runs one,
and rank 0 gets all of them in their order: what is written does not depend on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.config.component import described
from runtime.data.fields import Name
from runtime.data.loading import read, read_here
from runtime.data.samples import Samples, SlotIndex
from runtime.distributed.collectives import StopConsensus, gather_on_rank_0, sum_over_ranks
from runtime.errors import LockstepError, ObjectiveError
from runtime.inference.batch_rows import check_count, check_order
from runtime.inference.columns import ColumnBuilder, Columns, DataColumns, model_arguments
from runtime.model_calls import explained, is_out_of_memory
from runtime.objective import Objective, describe, full_precision
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything
from runtime.strategies import Strategy
from runtime.strategies.placement import to_device

_LOOKED_AT = 8  # samples, to see whether a batch keeps their order


class Predictor:
    """Predicts one data set.

    Args:
        samples: the data; a batch may have no target.
        micro_size: samples in one forward pass.
        columns: makes what is written of the model's output.
        id_part: part of the data that samples are called by. None: their places in the data set.
        encode: makes bytes of a microbatch's columns.
        seed: of the run; a model that draws random numbers draws what it draws in evaluation.

    Attributes:
        nan_samples: for how many samples the model gave NaN, on all ranks together; known when all are predicted.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        micro_size: int,
        strategy: Strategy,
        columns: ColumnBuilder,
        id_part: Name | None,
        encode: Callable[[Columns], bytes],
        make_loader: Callable[..., Any],
        seed: int,
    ) -> None:
        self._samples = samples
        self._micro_size = micro_size
        self._strategy = strategy
        self._columns = columns
        self._parts, self._id_part = DataColumns(samples.source), id_part
        self._encode = encode
        self._make_loader = make_loader
        self._seed = seed
        self.nan_samples = 0

    @torch.no_grad()
    def predict(self, append: Callable[[bytes], None], stop_requested: Callable[[], bool] = lambda: False) -> bool:
        """Predict everything; return False if it was cut short, after the same round on every rank.

        Collective: every rank must call this.

        Args:
            append: called on rank 0 with one microbatch after the other, in the data set's order.
            stop_requested: asked in every round.

        Raises:
            LockstepError: the model's output, or the batch, is not what the configuration says.
        """
        module = self._strategy.unwrapped
        was_training = module.training
        module.eval()
        try:
            with preserved_random_state(self._strategy.device):
                return self._run_share(append, stop_requested)
        finally:
            module.train(was_training)

    def _run_share(self, append: Callable[[bytes], None], stop_requested: Callable[[], bool]) -> bool:
        strategy = self._strategy
        microbatches = -(-len(self._samples) // self._micro_size)
        own = list(range(strategy.rank, microbatches, strategy.world_size))
        rounds = -(-microbatches // strategy.world_size)
        spare = rounds - len(own) if strategy.collective_forward else 0
        own += [0] * spare  # run along with the others, and forgotten
        batches = read(self._samples, map(self._share, own), self._make_loader)
        stop_consensus = StopConsensus(world_size=strategy.world_size, device=strategy.device)
        nan_samples = torch.zeros((), dtype=torch.float64, device=strategy.device)
        for place in range(rounds):  # as many on every rank
            stop_consensus.begin(stop_requested())
            if stop_consensus.end():
                return False
            payload = b""
            if place < len(own):
                batch = next(batches)
                self._check_rows(batch, self._share(own[place]), first=place == 0)
                predictions, payload = self._predicted(own[place], batch)
                if place < len(own) - spare:
                    nan_samples += _with_nan(predictions)
            if place >= len(own) - spare:
                payload = b""
            for gathered in gather_on_rank_0(payload, strategy.device):  # in the order of the ranks, so in order
                if gathered:
                    append(gathered)
        self.nan_samples = int(sum_over_ranks(nan_samples.cpu(), strategy.device))
        return True

    def _check_rows(self, batch: Any, share: SlotIndex, *, first: bool) -> None:
        """Refuse batches whose rows are not the samples. Their order is looked at in a rank's first one, which costs reading.

        Raises:
            DataError: what is wrong with them.
        """
        if not self._samples.own_batches:
            return
        check_count(batch, len(share.ids))
        if first and self._columns.follows_places(self._strategy.unwrapped.objective.fields):
            few = share._replace(ids=share.ids[:_LOOKED_AT])
            alone = [few._replace(ids=few.ids[n : n + 1]) for n in range(len(few.ids))]
            together, *singles = read(self._samples, iter([few, *alone]), read_here)
            check_order(together, singles)

    def _predicted(self, number: int, batch: Any) -> tuple[Mapping[str, Tensor], bytes]:
        """Return what the objective makes of one microbatch, and its encoded columns."""
        strategy = self._strategy
        module, index = strategy.unwrapped, self._share(number).ids
        fields = module.objective.fields
        ids = self._parts.ids(batch, index, self._id_part)
        seed_everything(derive(self._seed, Purpose.EVALUATION, 0, number), strategy.device)
        positional, named = model_arguments(fields, to_device(batch, strategy.device))
        with strategy.autocast():
            output = fields.output_of(self._output(positional, named))
            predictions = self._named(module.objective, full_precision(output))
        columns = self._columns.build(predictions, ids, index, lambda name: self._parts.of(batch, index, name))
        return predictions, self._encode(columns)

    def _output(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        try:
            return self._strategy.output(positional, named)
        except Exception as error:
            message = explained(error, self._strategy.unwrapped, describe([*positional, *named.values()]))
            if message is None:
                raise
            raise message from error

    def _named(self, objective: Objective, output: Any) -> Mapping[str, Tensor]:
        try:
            return objective.predicted(output)
        except Exception as error:
            if isinstance(error, LockstepError) or is_out_of_memory(error):
                raise
            kind = (
                f"a tensor of shape {tuple(output.shape)}"
                if isinstance(output, Tensor)
                else f"a {type(output).__name__}"
            )
            raise ObjectiveError(
                f"{type(objective).__name__}.predicted raised {described(error)}; the model's output is {kind} (model.output "
                "says which part of what it returns that is)"
            ) from error

    def _share(self, number: int) -> SlotIndex:
        start = number * self._micro_size
        return SlotIndex(0, np.arange(start, min(start + self._micro_size, len(self._samples)), dtype=np.int64))


def _with_nan(predictions: Mapping[str, Tensor]) -> Tensor:
    """Return for how many samples, the rows of each tensor, a prediction is NaN; stays on the device."""
    rows = [value.isnan().flatten(1).any(1) if value.ndim > 1 else value.isnan() for value in predictions.values()]
    return torch.stack(rows).any(0).sum() if rows else torch.zeros(())
