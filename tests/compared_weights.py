"""Judges the weights of two runs that must be equal but for rounding.

Adam and its relatives divide a gradient by its own size. An element whose true gradient is zero (the bias of attention's keys,
a bias before BatchNorm) therefore moves by rounding divided by rounding, up to the whole learning rate a step, and two correct
runs drift apart there. A wider bound for everything would hide real errors, so such *free* elements are found by their gradient
in float64 and are judged by what they can change, the model's output; every other element is judged strictly.

An element whose gradient is exactly zero in float64 (the embedding of a token that never occurs) is not free: nothing moves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.build.builder import Builder
from runtime.build.components import check_components
from runtime.config.file import load, load_run
from runtime.objective import Loss, TrainingModule

ROUNDING_OF_ZERO = (
    1e-10  # of the largest gradient of the model; float64 leaves 1e-16, and true gradients are above 1e-8
)
SAME_OUTPUT = 1e-10  # in float64, relative to the largest output
MOST_FREE = 0.2  # of all elements: more would mean that the loss does not depend on the model
_BATCHES = 3


class Difference(NamedTuple):
    """How far the weights of two runs are apart.

    Args:
        held: largest absolute difference of an element that a gradient holds in place.
        relative: the same, relative to the largest element of its tensor.
        where: the name of the tensor with the largest absolute difference.
        free: largest absolute difference of an element whose true gradient is zero.
        output: how much the free elements change the model's output, relative to the largest output.
    """

    held: float
    relative: float
    where: str
    free: float
    output: float


class Truth:
    """The model of a run in float64, without dropout, with batches of its own data.

    Args:
        config: the run's folder, its YAML file, or its configuration.
        num_batches: of the first epoch.
    """

    def __init__(self, config: Path | Mapping[str, Any], *, num_batches: int = _BATCHES) -> None:
        loaded = load_run(config) if isinstance(config, Path) else load(config)
        check_components(loaded)
        builder = Builder(loaded)
        self.module = TrainingModule(builder.model(), builder.objective()).double().eval()
        for part in self.module.modules():
            if isinstance(part, _BatchNorm):  # in evaluation its statistics would no longer follow a bias before it
                part.train()
        samples = builder.samples("train", batch_size=loaded.values.batch.global_size)
        assert samples is not None
        order = builder.order(samples.source)
        ids = (order.batch(0, number) for number in range(min(num_batches, order.num_batches(0))))
        self._batches = [_doubled(samples.source[torch.from_numpy(each)]) for each in ids]

    def free(self, *weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, by the model's names, which elements have a true gradient of zero at all of these weights."""
        size: dict[str, Tensor] = {}
        for state in weights:
            with self._at(state) as model:
                for batch in self._batches:
                    self.module.zero_grad()
                    _scalar(self.module(batch)).backward()
                    for name, parameter in model.named_parameters():
                        if parameter.grad is not None:
                            size[name] = size.get(name, 0) + parameter.grad.abs()
        assert all(bool(torch.isfinite(total).all()) for total in size.values())
        bound = ROUNDING_OF_ZERO * max(float(total.max()) for total in size.values())
        free = {name: (total > 0) & (total <= bound) for name, total in size.items()}
        share = sum(int(mask.sum()) for mask in free.values()) / sum(mask.numel() for mask in free.values())
        assert share <= MOST_FREE, f"{share:.0%} of the elements would have no gradient"
        return free

    def difference(self, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Difference:
        """Compare the weights of two runs; names and shapes must be the same."""
        assert expected.keys() == got.keys()
        free = self.free(expected, got)
        held, relative, where, freely = 0.0, 0.0, "", 0.0
        exchanged = dict(expected)
        for name, value in expected.items():
            other = got[name]
            assert value.shape == other.shape, name
            apart = (value.double() - other.double()).abs()
            mask = free.get(name, torch.zeros(value.shape, dtype=torch.bool))
            freely = max([freely, *apart[mask].tolist()])
            exchanged[name] = torch.where(mask, other, value)
            if mask.all():
                continue
            worst = float(apart[~mask].max())
            if not worst <= held:  # NaN is the worst
                held, where = worst, name
            relative = max(relative, worst / max(float(value.double().abs().max()), 1e-12))
        return Difference(held, relative, where, freely, self._change_of_output(expected, exchanged))

    def _change_of_output(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            outputs = [self._outputs(first), self._outputs(second)]
        scale = max(float(output.abs().max()) for output in outputs[0])
        return max(float((a - b).abs().max()) for a, b in zip(*outputs, strict=True)) / scale

    def _outputs(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """Return everything that the model returns for the batches, and the losses."""
        found: list[Tensor] = []
        with self._at(state) as model:
            hook = model.register_forward_hook(lambda *called: found.extend(_tensors(called[-1])))
            found.extend([_scalar(self.module(batch)) for batch in self._batches])
            hook.remove()
        return found

    @contextmanager
    def _at(self, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        model = self.module.model
        model.load_state_dict(
            {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
        )
        yield model


def difference(config: Path | Mapping[str, Any], expected: Mapping[str, Any], got: Mapping[str, Any]) -> Difference:
    """Compare the weights of two runs of one model, given as state dicts of tensors or arrays."""
    as_tensors = ({name: torch.as_tensor(value) for name, value in state.items()} for state in (expected, got))
    return Truth(config).difference(*as_tensors)


def assert_weights_agree(
    config: Path | Mapping[str, Any],
    expected: Mapping[str, Any],
    got: Mapping[str, Any],
    *,
    within: float = math.inf,
    relative: float = math.inf,
) -> None:
    """Refuse two runs of which free elements change the output, or other elements differ by more than is said.

    Args:
        within: absolute bound of all elements that a gradient holds.
        relative: the same, relative to the largest element of each tensor.
    """
    found = difference(config, expected, got)
    assert found.held < within, found
    assert found.relative < relative, found
    assert found.output < SAME_OUTPUT, found


def _scalar(loss: Loss) -> Tensor:
    return loss.sum.sum()  # an objective may have several sums


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        parts: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
        for part in parts:
            yield from _tensors(part)


def _doubled(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _doubled(value) for key, value in batch.items()}
    return type(batch)(_doubled(value) for value in batch) if isinstance(batch, list | tuple) else batch
