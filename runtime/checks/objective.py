"""Check that an objective is additive: its sums over two sets of samples add up to the sum over both, and so do its weights.

A mean instead of a sum divides the learning rate by the batch; a loss that couples samples depends on how a global batch is
split. Both are detected by one comparison, f(A) + f(B) = f(A and B), in evaluation mode, with dropout off and BatchNorm's
statistics fixed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from runtime.build.preparation import RunComponents
from runtime.checks.traces import left_as_it_was
from runtime.config.learning import ObjectiveSection
from runtime.config.locations import Locations
from runtime.data.batches import Cursor
from runtime.data.loading import MakeLoader, read, read_here
from runtime.data.samples import SlotIndex
from runtime.data.stream_pieces import StreamIndex
from runtime.data.training_data import MappedData, StreamedData, TrainingData
from runtime.data.yielded_batches import rows_from
from runtime.distributed.collectives import gather_bytes
from runtime.errors import ConfigurationError, ForwardError, LockstepError
from runtime.losses.weighted_sum import WeightedSum
from runtime.objective import Loss, Objective, TrainingModule
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything
from runtime.strategies import Strategy
from runtime.strategies.placement import to_device

_MOST_SAMPLES = 8  # of both sets together
_ROUNDINGS = 4.0
"""Tolerance in eps of the coarsest dtype in use, relative to the sums. Measured maximum, for eight losses on three kinds of
model in four dtypes: 0.65."""
_SPREADS = 10.0  # tolerance relative to the difference of the same samples under another seed


class SampleSets(NamedTuple):
    """Two sets of samples as batches, both sets in one batch, and a function that yields each sample as a batch.

    Args:
        always_together: the samples are in one slot for any K, so only a mean is wrong, not a loss that couples them.
    """

    first: Any
    second: Any
    both: Any
    sizes: tuple[int, int]
    singles: Callable[[], Iterator[Any]] = lambda: iter(())
    always_together: bool = False


@dataclass(frozen=True)
class AdditivityError:
    """A sum, or a weight, over both sets that differs from the sum of those over each.

    Args:
        of: ``sum``, ``weight``, or the name of a reported part.
        part: name of the loss if there are several, else empty.
        is_mean: it is the average of the two.
    """

    of: str
    part: str
    first: float
    second: float
    both: float
    is_mean: bool = False


def check_additivity(
    section: ObjectiveSection,
    strategy: Strategy,
    prepared: RunComponents,
    make_loader: MakeLoader,
    *,
    batch_size: int,
    compiled: bool,
    where: Locations,
    warn: Callable[[str], None],
) -> None:
    """Refuse an objective that returns a mean; warn of one that couples samples, and list it as inexact.

    Ranks read the same samples, unless a stream shards itself; a finding of one rank applies to all. Collective: every rank
    must call this.

    Args:
        batch_size: samples of a global batch.
        compiled: whether the model is compiled.

    Raises:
        ConfigurationError: the objective returns a mean.
    """
    module = strategy.unwrapped
    if module.objective.couples_samples:
        return
    sets = sets_of(prepared.data, slots=prepared.assignment.slots, size=batch_size, make_loader=make_loader)
    if not strategy.state_io.held_whole:
        # No gradient, which would require a backward pass, and no second try after an aborted forward pass.
        tries = [(False, strategy.autocast)]
        sizes = set(gather_bytes(json.dumps(sets and sets.sizes).encode(), strategy.device))
        sets = sets if len(sizes) == 1 else None  # otherwise ranks would run different numbers of forward passes
    else:
        tries = [(gradients, cast) for gradients in (False, True) for cast in (nullcontext, strategy.autocast)]
    found = (
        []
        if sets is None
        else deviations(
            module,
            sets,
            device=strategy.device,
            tries=tries,
            compiled=compiled,
            together=not strategy.state_io.held_whole,
        )
    )
    replies = gather_bytes(json.dumps([asdict(deviation) for deviation in found]).encode(), strategy.device)
    found = next(
        (of_rank for reply in replies if (of_rank := [AdditivityError(**one) for one in json.loads(reply)])), []
    )
    for text in judged(section, module.objective, found, where):
        warn(text)


def judged(
    section: ObjectiveSection, objective: Objective, found: list[AdditivityError], where: Locations
) -> Iterator[str]:
    """Yield one warning for each deviation, and mark the objectives that couple samples.

    Raises:
        ConfigurationError: an objective returns a mean.
    """
    # A mean whose weight is not a sum either, such as 1 per microbatch, is divided correctly; only the weight is reported.
    of_weights = {deviation.part for deviation in found if deviation.of == "weight"}
    found = [d for d in found if not (d.of == "sum" and d.is_mean and d.part in of_weights)]
    means = [deviation for deviation in found if deviation.is_mean and deviation.of == "sum"]
    if means:
        raise ConfigurationError([where.problem(_key(mean), _mean(mean, _target(section, mean))) for mean in means])
    coupled: set[str] = set()
    for deviation in found:
        name = _target(section, deviation)
        figures = (
            f"{deviation.both:.6g} over two sets together, {deviation.first:.6g} + {deviation.second:.6g} separately"
        )
        if deviation.of == "sum":
            mark_coupled(objective, [deviation.part])
            coupled.add(deviation.part)
            yield (
                f"objective: the loss of a sample in {name} depends on the others of its microbatch ({figures}), so the result "
                "depends on K (batch.slots): mask padding, multiply terms that do not belong to a sample (a penalty on "
                "weights) by the number of samples, or set couples_samples = True in the class if this is intended"
            )
        elif deviation.part in coupled:
            continue
        elif deviation.of == "weight":
            mark_coupled(objective, [deviation.part])
            yield (
                f"objective: the weight of {name} is not a sum over its samples ({figures}), so the result depends on K "
                "(batch.slots): count each sample's elements separately, without padding"
            )
        else:
            cure = "it looks like a mean; return a sum" if deviation.is_mean else "return a sum over samples"
            yield f"objective: the part {deviation.of!r} of {name} will be reported wrongly ({figures}): {cure}"


def sets_of(data: TrainingData, *, slots: int, size: int, make_loader: MakeLoader = read_here) -> SampleSets | None:
    """Read two small sets of training samples, and both in one batch no larger than a slot; None if impossible."""
    slot = -(-size // slots)
    if isinstance(data, MappedData):
        ids = data.order.batch(0, 0)[: min(_MOST_SAMPLES, slot)]
        half = len(ids) // 2
        if half == 0:
            return None
        parts = (ids[:half], ids[half : 2 * half], ids[: 2 * half])
        first, second, both = read(data.samples, iter([SlotIndex(0, part) for part in parts]), make_loader)

        def singles() -> Iterator[Any]:
            alone = [SlotIndex(0, ids[i : i + 1]) for i in range(2 * half)]
            return read(data.samples, iter(alone), make_loader)

        return SampleSets(first, second, both, (half, half), singles)
    source = data.samples.source
    if hasattr(source, "__next__"):
        return None  # samples read here would be lost
    if data.samples.batches:
        return _sets_within(data, make_loader)
    divisor = max(1, -(-data.samples.batch_size // min(_MOST_SAMPLES, slot)))
    ranges = ((0, 2 * divisor), (1, 2 * divisor), (0, divisor))
    indices = iter([StreamIndex(Cursor(), number, of, range(of)) for number, of in ranges])
    one, other, both = read(copy(data.samples), indices, make_loader)
    if not one.samples or not other.samples:
        return None

    def streamed() -> Iterator[Any]:
        of = data.samples.batch_size
        alone = [StreamIndex(Cursor(), number, of, range(of)) for number in range(one.samples + other.samples)]
        return (piece.batch for piece in read(copy(data.samples), iter(alone), make_loader) if piece.samples)

    return SampleSets(one.batch, other.batch, both.batch, (one.samples, other.samples), streamed)


def _sets_within(data: StreamedData, make_loader: MakeLoader) -> SampleSets | None:
    """Slice both sets from the first yielded batch of several samples; None if there is none, or it cannot be sliced."""
    slots = data.samples.batch_size
    indices = (StreamIndex(Cursor(), slot, slots, range(slots)) for slot in range(slots))
    pieces = read(copy(data.samples), indices, make_loader)
    piece = next((piece for piece in pieces if piece.samples > 1), None)
    if piece is None:
        return None
    half = min(_MOST_SAMPLES, piece.samples) // 2

    def rows(start: int, stop: int) -> Any:
        return rows_from(piece.batch, start, stop, rows=piece.samples)

    if rows(0, half) is None:
        return None
    return SampleSets(
        rows(0, half),
        rows(half, 2 * half),
        rows(0, 2 * half),
        (half, half),
        lambda: (rows(i, i + 1) for i in range(2 * half)),
        always_together=True,
    )


def deviations(
    module: TrainingModule,
    sets: SampleSets,
    *,
    device: torch.device,
    tries: Sequence[tuple[bool, Callable[[], AbstractContextManager[None]]]] = (
        (False, nullcontext),
        (True, nullcontext),
    ),
    compiled: bool = False,
    together: bool = False,
) -> list[AdditivityError]:
    """Compare an objective's sums and weights over two sets with those over both. Changes no state.

    Errors here, with so few samples or in evaluation mode, are ignored: the first step reports real ones.

    Args:
        tries: pairs of whether gradients are recorded (an objective may need them) and a context for the forward passes, tried
            until one works. The model's own dtypes come first: half precision would hide small deviations.
        together: all ranks run the same number of forward passes, whatever each finds.
        compiled: the model is compiled; it is run eagerly here, since other shapes would trigger recompilation.
    """
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with preserved_random_state(device), left_as_it_was(module, training=False), eager:
        for gradients, surrounding in tries:
            try:
                with torch.set_grad_enabled(gradients), surrounding():
                    return _compared(module, sets, device, together=together)
            except ForwardError:
                continue  # the next try may work; otherwise the first step reports it
            except LockstepError:
                return []
            except Exception:  # noqa: S112 - the next try may work; otherwise the first step reports it
                continue
    return []


def _compared(
    module: TrainingModule, sets: SampleSets, device: torch.device, *, together: bool
) -> list[AdditivityError]:
    objective = module.objective
    names = list(objective.parts) if isinstance(objective, WeightedSum) else [""]
    weights = [
        _as_tuple(objective.checked_weight(batch, size))
        for batch, size in ((sets.first, sets.sizes[0]), (sets.second, sets.sizes[1]), (sets.both, sum(sets.sizes)))
    ]

    def measured(batch: Any, seed: int = 0) -> dict[tuple[str, str], float]:
        seed_everything(derive(seed, Purpose.EVALUATION), device)
        loss: Loss = module(to_device(batch, device))
        sums = loss.sum.detach().double().reshape(-1).tolist()
        parts = {} if loss.sum.ndim else {(name, ""): float(part.double()) for name, part in loss.parts.items()}
        return {("sum", name): value for name, value in zip(names, sums, strict=True)} | parts

    first, second, both = (measured(batch) for batch in (sets.first, sets.second, sets.both))
    # The losses of an objective that draws random numbers differ with the seed: smaller deviations cannot be detected.
    again = [(here, measured(batch, 1)) for here, batch in ((first, sets.first), (second, sets.second))]
    rounding = _ROUNDINGS * _rounding(module)

    def tolerance(key: tuple[str, str], terms: float = 0.0) -> float:
        size = abs(first[key]) + abs(second[key]) + abs(both[key])
        spread = sum(abs(here[key] - there[key]) for here, there in again)
        return rounding * max(size, 2 * terms) + _SPREADS * spread

    common = [key for key in both if key in first and key in second]
    finite = [key for key in common if all(math.isfinite(found[key]) for found in (first, second, both))]
    gaps = {key: abs(first[key] + second[key] - both[key]) for key in finite}
    suspects = [key for key in finite if gaps[key] > tolerance(key)]
    found = []
    # If samples' losses have both signs, their sum may be far smaller than the terms that were rounded: use single samples.
    alone = [measured(batch) for batch in sets.singles()] if suspects or together else []
    for key in suspects:
        allowed = tolerance(key, sum(abs(one[key]) for one in alone if math.isfinite(one.get(key, math.nan))))
        if gaps[key] > allowed:
            place = names.index(key[1])
            shares = (sets.sizes, (weights[0][place], weights[1][place]))
            means = [(first[key] * a + second[key] * b) / (a + b) for a, b in shares if a + b > 0]
            is_mean = any(abs(mean - both[key]) <= allowed for mean in means)
            found.append(AdditivityError(*key, first[key], second[key], both[key], is_mean))
    for part, one, other, whole in zip(names, *weights, strict=True):
        if abs(one + other - whole) > 1e-6 * (one + other + whole):
            found.append(AdditivityError("weight", part, one, other, whole))
    return [deviation for deviation in found if deviation.is_mean or not sets.always_together]


def _rounding(module: TrainingModule) -> float:
    types = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()} | {torch.float32}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        types.add(torch.bfloat16)
    tf32 = torch.get_float32_matmul_precision() != "highest" and next(module.parameters()).device.type == "cuda"
    return max(2.0**-10 if tf32 else 0.0, *(torch.finfo(dtype).eps for dtype in types))


def _as_tuple(weight: float | tuple[float, ...]) -> tuple[float, ...]:
    return weight if isinstance(weight, tuple) else (weight,)


def mark_coupled(objective: Objective, parts: Iterable[str]) -> None:
    """Mark an objective, or some of its losses, as coupling samples."""
    for part in parts:
        objective.couples_samples = True
        if isinstance(objective, WeightedSum) and part in objective.parts:
            objective.parts[part].couples_samples = True


def coupled_parts(objective: Objective) -> list[str]:
    """Return the parts marked by :func:`mark_coupled`, for a checkpoint: a resumed run is not checked again."""
    if isinstance(objective, WeightedSum):
        return [name for name, part in objective.parts.items() if part.couples_samples]
    return [""] if objective.couples_samples else []


def _key(deviation: AdditivityError) -> tuple[str, ...]:
    return ("objective", "losses", deviation.part, "target") if deviation.part else ("objective", "target")


def _target(section: ObjectiveSection, deviation: AdditivityError) -> str:
    return section.losses[deviation.part].target if deviation.part else section.target or ""


def _mean(mean: AdditivityError, target: str) -> str:
    return (
        f"{target} returns a mean, not a sum: {mean.first:.6g} and {mean.second:.6g} over two sets of samples, "
        f"and their average, {mean.both:.6g}, over both. The runtime itself divides by the weight of the global batch, so the "
        "learning rate would be divided by the batch size: return the sum (reduction='sum', or .sum() instead of .mean())"
    )
