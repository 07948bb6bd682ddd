"""Prediction: every sample once, in the data set's order, on any number of ranks, with a bounded number of rows in memory.

The data is cut into the same numbered microbatches as in evaluation, with the same seeds. In each round every rank runs one
microbatch, and rank 0 gathers them in order, so the output does not depend on the world size.
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

_ORDER_CHECK_SAMPLES = 8  # read one by one, to check that a batch keeps their order


class Predictor:
    """Predicts one data set.

    Args:
        samples: the data; a batch may have no target.
        micro_size: samples in one forward pass.
        columns: makes the columns to write from the model's output.
        id_part: part of the data that holds the samples' ids. None: their positions in the data set.
        encode: encodes a microbatch's columns as bytes.
        seed: of the run; a model that draws random numbers draws the same ones as in evaluation.

    Attributes:
        nan_samples: number of samples with a NaN prediction, over all ranks; known after :meth:`predict`.
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
        """Predict everything; return False if stopped early, after the same round on every rank.

        Collective: every rank must call this.

        Args:
            append: called on rank 0 with one encoded microbatch at a time, in the data set's order.
            stop_requested: called in every round.

        Raises:
            LockstepError: the model's output or the batch does not match the configuration.
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
        own += [0] * spare  # run because every rank must take part in a forward pass, and discarded
        batches = read(self._samples, map(self._share, own), self._make_loader)
        stop_consensus = StopConsensus(world_size=strategy.world_size, device=strategy.device)
        nan_samples = torch.zeros((), dtype=torch.float64, device=strategy.device)
        for round_ in range(rounds):  # the same number on every rank
            stop_consensus.begin(stop_requested())
            if stop_consensus.end():
                return False
            payload = b""
            if round_ < len(own):
                batch = next(batches)
                self._check_rows(batch, self._share(own[round_]), first=round_ == 0)
                predictions, payload = self._predict_microbatch(own[round_], batch)
                if round_ < len(own) - spare:
                    nan_samples += _with_nan(predictions)
            if round_ >= len(own) - spare:
                payload = b""
            for gathered in gather_on_rank_0(payload, strategy.device):  # in rank order, which is the data's order
                if gathered:
                    append(gathered)
        self.nan_samples = int(sum_over_ranks(nan_samples.cpu(), strategy.device))
        return True

    def _check_rows(self, batch: Any, share: SlotIndex, *, first: bool) -> None:
        """Refuse batches whose rows are not the samples. The order is checked in a rank's first batch only: it costs reads.

        Raises:
            DataError: rows are missing, extra or in another order.
        """
        if not self._samples.own_batches:
            return
        check_count(batch, len(share.ids))
        if first and self._columns.depend_on_positions(self._strategy.unwrapped.objective.fields):
            few = share._replace(ids=share.ids[:_ORDER_CHECK_SAMPLES])
            alone = [few._replace(ids=few.ids[n : n + 1]) for n in range(len(few.ids))]
            together, *singles = read(self._samples, iter([few, *alone]), read_here)
            check_order(together, singles)

    def _predict_microbatch(self, number: int, batch: Any) -> tuple[Mapping[str, Tensor], bytes]:
        """Return the objective's named predictions for one microbatch, and its encoded columns."""
        strategy = self._strategy
        module, index = strategy.unwrapped, self._share(number).ids
        fields = module.objective.fields
        ids = self._parts.ids(batch, index, self._id_part)
        seed_everything(derive(self._seed, Purpose.EVALUATION, 0, number), strategy.device)
        positional, named = model_arguments(fields, to_device(batch, strategy.device))
        with strategy.autocast():
            output = fields.output_of(self._output(positional, named))
            predictions = self._named_predictions(module.objective, full_precision(output))
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

    def _named_predictions(self, objective: Objective, output: Any) -> Mapping[str, Tensor]:
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
                "selects it from what the model returns)"
            ) from error

    def _share(self, number: int) -> SlotIndex:
        start = number * self._micro_size
        return SlotIndex(0, np.arange(start, min(start + self._micro_size, len(self._samples)), dtype=np.int64))


def _with_nan(predictions: Mapping[str, Tensor]) -> Tensor:
    """Return the number of samples (rows) with a NaN in any prediction, as a scalar tensor on the device."""
    rows = [value.isnan().flatten(1).any(1) if value.ndim > 1 else value.isnan() for value in predictions.values()]
    return torch.stack(rows).any(0).sum() if rows else torch.zeros(())
