"""A running average of the weights, evaluated and saved beside the raw ones and never mixed up with them."""

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
    """The average of every parameter that is not an integer: torch.optim.swa_utils.AveragedModel, without a second model.

    ``ema``: average <- decay * average + (1 - decay) * weight. ``swa``: the mean of all weights taken in (Izmailov et al.,
    "Averaging Weights Leads to Wider Optima", 2018). The first weights taken in are the first average; until then there is
    none, and the raw weights are what is evaluated.

    Averages are kept in float32 at least, and rounded to the weights' type where they take their place: at a decay of 0.999 a
    step of the average in bfloat16 is smaller than half of its last bit, so that it would stand still.

    Buffers are not averaged. With ``ema`` they are the raw ones: the average is never far from the weights that they belong
    to. With ``swa`` the average has BatchNorm statistics of its own, computed by :mod:`runtime.evaluation.batch_statistics`.

    Args:
        module: the bare TrainingModule.
        section: the configuration's section.
        weights: what this rank holds of the module's parameters, and so of their averages. Default: all of them.

    Attributes:
        count: how many weights were taken in.
    """

    def __init__(self, module: nn.Module, section: AveragingSection, weights: LocalWeights | None = None) -> None:
        self._section = section
        self._weights = weights or WholeWeights(module)
        self._average = {
            name: piece.detach().to(_kept_in(piece.dtype), copy=True)
            for name, piece in self._weights.pieces().items()
            if piece.is_floating_point() or piece.is_complex()
        }
        norms = batch_norms(module) if section.kind == "swa" else {}
        # By owner and name, not by tensor: Accelerate's prepare puts other tensors in the place of buffers.
        self._buffers = {
            f"{name}.{key}": (norm, key) for name, norm in norms.items() for key, _ in norm.named_buffers()
        }
        self._statistics: dict[str, Tensor] = {}
        self._statistics_of = 0
        self._before: tuple[dict[str, Tensor], int] | None = None  # statistics, and of which average
        self.count = 0
        self._updates = self._epochs = self._waited = 0

    @property
    def has_statistics(self) -> bool:
        """Tell whether the average has BatchNorm statistics of its own."""
        return bool(self._buffers)

    @property
    def lacks_statistics(self) -> bool:
        """Tell whether BatchNorm statistics of the present average are still to be computed."""
        return bool(self._buffers) and self._statistics_of != self.count

    def update(self) -> None:
        """Count one applied update, and take in its weights if that is due."""
        if self._has_begun(self._updates):
            self._wait("step")
        self._updates += 1

    def after_epoch(self) -> None:
        """Count one epoch, and take in the weights of its end if that is due."""
        if self._has_begun(self._updates - 1):
            self._wait("epoch")
        self._epochs += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the module hold the averaged weights, and their statistics if there are any, for a while."""
        if self.count == 0:
            yield
            return
        raw = self._put_in_place()
        try:
            yield
        finally:
            with torch.no_grad():
                for place, value in raw:
                    place.copy_(value)
            self._weights.written()

    def take_statistics(self, statistics: Mapping[str, Tensor], *, lasting: bool = True) -> None:
        """Keep BatchNorm statistics of the present average, by the names of buffers.

        Args:
            lasting: whether a run that goes on from here goes on with them, see :meth:`go_on`.
        """
        assert statistics.keys() == self._buffers.keys()
        self._before = None if lasting else (self._statistics, self._statistics_of)
        self._statistics, self._statistics_of = dict(statistics), self.count

    def go_on(self) -> None:
        """Put back the statistics that there were before those that only the end of a run has asked for."""
        if self._before is not None:
            (self._statistics, self._statistics_of), self._before = self._before, None

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by parameter name, the statistics by buffer name, and the counts.

        Collective where the ranks hold the weights together.
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
        """Go on from a state.

        Raises:
            CheckpointError: it is another kind of average.
        """
        kind = state.get("kind", self._section.kind)
        if kind != self._section.kind:
            raise CheckpointError(
                f"averaging.kind was {kind} and is {self._section.kind}: an average cannot go on as another. Undo the change, "
                "or begin another run (output=…)"
            )
        for name, average in self._average.items():
            average.copy_(self._weights.from_checkpoint(name, state["average"][name]))
        self._statistics = self._on_device(state["statistics"])
        before = state.get("before")
        self._before = None if before is None else (self._on_device(before["statistics"]), before["of"])
        self.count, self._statistics_of = state["count"], state["statistics_of"] or 0
        self._updates, self._epochs = state["updates"], state["epochs"]
        self._waited = state["waited"] if state.get("unit") in (None, self._section.interval.unit) else 0
        if not self._has_begun(self._updates):  # averaging.start was moved: what was averaged before it counts no more
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

    def _wait(self, unit: Literal["step", "epoch"]) -> None:
        every = self._section.interval
        if unit != every.unit:
            return
        self._waited += 1
        if self._waited >= every.count:  # more where a resumed run takes weights in more often
            self._waited = 0
            self._take_in()

    @torch.no_grad()
    def _take_in(self) -> None:
        averages: list[Tensor] = list(self._average.values())
        held = self._weights.pieces()
        weights: list[Tensor] = [
            held[name].to(average.dtype) for name, average in self._average.items()
        ]  # mostly itself
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
    def _put_in_place(self) -> list[tuple[Tensor, Tensor]]:
        """Put the averages in the place of weights and statistics; return the places and what they held."""
        held = self._weights.pieces()
        places: list[tuple[Tensor, Tensor]] = [(held[name], average) for name, average in self._average.items()]
        if self._buffers and not self.lacks_statistics:
            places += [(norm.get_buffer(key), self._statistics[name]) for name, (norm, key) in self._buffers.items()]
        raw = [(place, place.detach().clone()) for place, _ in places]
        for place, average in places:
            place.copy_(average)
        self._weights.written()
        return raw


def _kept_in(dtype: torch.dtype) -> torch.dtype:
    """Return the type that averages of weights of a type are kept in."""
    return torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the modules that keep running statistics of batches, by name."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}
    return {name: norm for name, norm in found.items() if norm.running_mean is not None}


def usable_average(stored: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the state of a :class:`WeightAverage`, as a checkpoint holds it, if there is an average that can be used.

    Raises:
        CheckpointError: there is none yet, or it has no statistics; the message goes on behind the checkpoint's name.
    """
    if stored is None:
        raise CheckpointError("holds no averaged weights (the YAML's averaging was not set)")
    if stored["count"] == 0:
        raise CheckpointError("holds no averaged weights yet: it was made before averaging.start")
    if stored["statistics_of"] not in (None, stored["count"]):
        raise CheckpointError(
            "holds averaged weights whose BatchNorm statistics were still to be computed: that is done before each evaluation "
            "of the average, and at the end of the run; take a checkpoint from there"
        )
    return stored


def averaged_state(model: Mapping[str, Tensor], stored: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return a model's state dict with the average in the place of each parameter, and with its own BatchNorm statistics.

    Args:
        model: the model's state dict; one and the same tensor under all names of a tied weight, which is averaged under its
            first name only.
        stored: the state of its :class:`WeightAverage`, as a checkpoint holds it.

    Raises:
        CheckpointError: there is no average, it does not fit the model, or it has no statistics.
    """
    stored = usable_average(stored)
    values = {**stored["average"], **stored["statistics"]}
    ours = {name.removeprefix("model."): value for name, value in values.items() if name.startswith("model.")}
    strange = [name for name in ours if name not in model]
    if strange:
        raise CheckpointError(f"holds an average of {', '.join(strange)}, which the state dict has not")
    of_raw = {id(model[name]): cast(Tensor, value).to(model[name].dtype) for name, value in ours.items()}
    return {name: of_raw.get(id(raw), raw) for name, raw in model.items()}
