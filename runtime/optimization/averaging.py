"""A running average of the weights, evaluated and saved in addition to the raw weights and separate from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from runtime.config.learning import AveragingSection
from runtime.errors import CheckpointError
from runtime.state.local_weights import LocalWeights, WholeWeights
from runtime.state.shards import whole


class WeightAverage:
    """The average of every non-integer parameter: torch.optim.swa_utils.AveragedModel, without a second model.

    ``ema``: average <- decay * average + (1 - decay) * weight. ``swa``: the mean of all weights added (Izmailov et al.,
    "Averaging Weights Leads to Wider Optima", 2018). The first weights added are the first average; before that there is none,
    and the raw weights are evaluated.

    Averages are kept in at least float32, and rounded to the weights' dtype when swapped in: with a decay of 0.999, an
    update of a bfloat16 average is smaller than half of its last bit, so the average would never change.

    Buffers are not averaged. With ``ema`` the raw buffers are used: the average stays close to the weights that they belong
    to. With ``swa`` the average has separate BatchNorm statistics, computed by :mod:`runtime.evaluation.batch_statistics`.

    Args:
        module: the bare TrainingModule.
        section: ``averaging`` in the YAML.
        weights: this rank's shards of the module's parameters, and so of their averages. Default: whole parameters.

    Attributes:
        count: number of weights averaged.
    """

    def __init__(self, module: nn.Module, section: AveragingSection, weights: LocalWeights | None = None) -> None:
        self._section = section
        self._weights = weights or WholeWeights(module)
        self._average = {
            name: piece.detach().to(_average_dtype(piece.dtype), copy=True)
            for name, piece in self._weights.pieces().items()
            if piece.is_floating_point() or piece.is_complex()
        }
        norms = batch_norms(module) if section.kind == "swa" else {}
        # By owner and name, not by tensor: Accelerate's prepare replaces the buffers' tensors.
        self._buffers = {
            f"{name}.{key}": (norm, key) for name, norm in norms.items() for key, _ in norm.named_buffers()
        }
        self._statistics: dict[str, Tensor] = {}
        self._statistics_of = 0
        self._before: tuple[dict[str, Tensor], int] | None = None  # statistics, and the count of their average
        self.count = 0
        self._updates = self._epochs = self._waited = 0

    @property
    def has_statistics(self) -> bool:
        """Whether the average has separate BatchNorm statistics."""
        return bool(self._buffers)

    @property
    def lacks_statistics(self) -> bool:
        """Whether the BatchNorm statistics of the current average are still to be computed."""
        return bool(self._buffers) and self._statistics_of != self.count

    def update(self) -> None:
        """Count one applied update, and average its weights if due."""
        if self._has_begun(self._updates):
            self._count("step")
        self._updates += 1

    def after_epoch(self) -> None:
        """Count one epoch, and average the weights at its end if due."""
        if self._has_begun(self._updates - 1):
            self._count("epoch")
        self._epochs += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Swap the averaged weights, and their statistics if any, into the module; restore the raw ones on exit."""
        if self.count == 0:
            yield
            return
        raw = self._swap_in()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in raw:
                    tensor.copy_(value)
            self._weights.refresh()

    def set_statistics(self, statistics: Mapping[str, Tensor], *, lasting: bool = True) -> None:
        """Set the BatchNorm statistics of the current average, by buffer name.

        Args:
            lasting: whether a run resumed from here keeps them, see :meth:`restore_statistics`.
        """
        assert statistics.keys() == self._buffers.keys()
        self._before = None if lasting else (self._statistics, self._statistics_of)
        self._statistics, self._statistics_of = dict(statistics), self.count

    def restore_statistics(self) -> None:
        """Restore the statistics from before those that were computed only because the run ended."""
        if self._before is not None:
            (self._statistics, self._statistics_of), self._before = self._before, None

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by parameter name, the statistics by buffer name, and the counts.

        Collective if the weights are sharded.
        """
        return {
            "average": {name: self._weights.to_checkpoint(name, piece) for name, piece in self._average.items()},
            "count": self.count,
            "statistics": dict(self._statistics),
            "statistics_of": self._statistics_of if self._buffers else None,
            "before": None if self._before is None else {"statistics": dict(self._before[0]), "of": self._before[1]},
            "updates": self._updates,
            "epochs": self._epochs,
            "waited": self._waited,
            "kind": self._section.kind,
            "unit": self._section.interval.unit,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Raises:
            CheckpointError: it is of another kind of average.
        """
        kind = state.get("kind", self._section.kind)
        if kind != self._section.kind:
            raise CheckpointError(
                f"averaging.kind was {kind} and is {self._section.kind}: an average cannot change its kind. Undo the change, "
                "or start another run (output=…)"
            )
        for name, average in self._average.items():
            average.copy_(self._weights.from_checkpoint(name, state["average"][name]))
        self._statistics = self._on_device(state["statistics"])
        before = state.get("before")
        self._before = None if before is None else (self._on_device(before["statistics"]), before["of"])
        self.count, self._statistics_of = state["count"], state["statistics_of"] or 0
        self._updates, self._epochs = state["updates"], state["epochs"]
        self._waited = state["waited"] if state.get("unit") in (None, self._section.interval.unit) else 0
        if not self._has_begun(self._updates):  # averaging.start was moved: drop what was averaged before it
            self.count = self._statistics_of = 0

    def _on_device(self, statistics: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            name: whole(statistics[name]).to(norm.get_buffer(key).device, copy=True)
            for name, (norm, key) in self._buffers.items()
            if name in statistics
        }

    def _has_begun(self, updates: int) -> bool:
        start = self._section.start
        return start is None or start.reached(steps=updates, epochs=self._epochs)

    def _count(self, unit: Literal["step", "epoch"]) -> None:
        interval = self._section.interval
        if unit != interval.unit:
            return
        self._waited += 1
        if self._waited >= interval.count:  # greater where a resumed run has a shorter interval
            self._waited = 0
            self._average_weights()

    @torch.no_grad()
    def _average_weights(self) -> None:
        averages: list[Tensor] = list(self._average.values())
        held = self._weights.pieces()
        weights: list[Tensor] = [
            held[name].to(average.dtype) for name, average in self._average.items()
        ]  # mostly no copy
        if self.count == 0:
            torch._foreach_copy_(averages, weights)
        elif self._section.kind == "swa":
            get_swa_multi_avg_fn()(averages, weights, self.count)  # type: ignore[no-untyped-call]
        else:
            get_ema_multi_avg_fn(self._decay())(averages, weights, self.count)  # type: ignore[no-untyped-call]
        self.count += 1

    def _decay(self) -> float:
        decay = self._section.ema_decay
        return min(decay, (1 + self.count) / (10 + self.count)) if self._section.warmup else decay

    @torch.no_grad()
    def _swap_in(self) -> list[tuple[Tensor, Tensor]]:
        """Overwrite weights and statistics with the averages; return the tensors and copies of their raw values."""
        held = self._weights.pieces()
        pairs: list[tuple[Tensor, Tensor]] = [(held[name], average) for name, average in self._average.items()]
        if self._buffers and not self.lacks_statistics:
            pairs += [(norm.get_buffer(key), self._statistics[name]) for name, (norm, key) in self._buffers.items()]
        raw = [(tensor, tensor.detach().clone()) for tensor, _ in pairs]
        for tensor, average in pairs:
            tensor.copy_(average)
        self._weights.refresh()
        return raw


def _average_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the averages of weights of a dtype."""
    return torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm modules with running statistics, by name."""
    norms = {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.running_mean is not None}


def usable_average(stored: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a checkpoint's :class:`WeightAverage` state if its average can be used.

    Raises:
        CheckpointError: there is no average, or it has no statistics; the message continues the checkpoint's name.
    """
    if stored is None:
        raise CheckpointError("holds no averaged weights (averaging was not set in the YAML)")
    if stored["count"] == 0:
        raise CheckpointError("holds no averaged weights yet: it was made before averaging.start")
    if stored["statistics_of"] not in (None, stored["count"]):
        raise CheckpointError(
            "holds averaged weights whose BatchNorm statistics were still to be computed: that is done before each evaluation "
            "of the average, and at the end of the run; use a checkpoint made then"
        )
    return stored


def averaged_state(model: Mapping[str, Tensor], stored: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return a model's state dict with the averaged parameters, and with the average's BatchNorm statistics.

    Args:
        model: the model's state dict, with the same tensor object under all names of a tied weight, which is averaged under
            its first name only.
        stored: a checkpoint's :class:`WeightAverage` state.

    Raises:
        CheckpointError: there is no average, it does not fit the model, or it has no statistics.
    """
    stored = usable_average(stored)
    values = {**stored["average"], **stored["statistics"]}
    of_model = {name.removeprefix("model."): value for name, value in values.items() if name.startswith("model.")}
    unknown = [name for name in of_model if name not in model]
    if unknown:
        raise CheckpointError(f"holds an average of {', '.join(unknown)}, which the state dict does not have")
    averages = {id(model[name]): cast(Tensor, value).to(model[name].dtype) for name, value in of_model.items()}
    return {name: averages.get(id(raw), raw) for name, raw in model.items()}
