"""Torch's schedulers by name, composite schedulers, and Lockstep's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

from runtime.config import component
from runtime.config.component import ComponentError

NAMESPACES = ("torch.optim.lr_scheduler", "runtime.optimization.schedulers")
LENGTHS = ("T_max", "total_steps", "total_iters")
_FUNCTIONS = ("lr_lambda", "scale_fn")
_INNER = "schedulers"
_InnerScheduler = tuple[tuple[str, ...], str, Mapping[str, Any]]  # path, target and arguments


class WarmupStableDecay(LRScheduler):
    """A constant rate that decays at the end; the warm-up before it is the configuration's ``warmup_steps``.

    Its state is only the count: if a run is extended in its stable phase, the stable phase becomes longer. Source: Hu et al.,
    "MiniCPM" (2024), section 4; the square root from Hägele et al. (2024), section 4.

    Args:
        optimizer: the optimizer.
        total_iters: length of stable phase plus decay, in the schedule's unit.
        decay: length of the decay: an integer in the schedule's unit, or a fraction of ``total_iters``, rounded up.
        shape: with x from 0 to 1 over the decay: ``linear`` 1 - x, ``cosine`` (1 + cos(pi x)) / 2, ``sqrt`` 1 - sqrt(x).
        final: share of the rate that is left at the end.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_iters: int,
        *,
        decay: float = 0.2,
        shape: Literal["linear", "cosine", "sqrt"] = "linear",
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.decay_iters = decay if isinstance(decay, int) else math.ceil(decay * total_iters)
        if not 1 <= self.decay_iters <= total_iters:
            raise ValueError(
                f"decay is {decay}: give an integer from 1 to total_iters ({total_iters}), or a share above 0, at most 1.0"
            )
        if shape not in _SHAPES:
            raise ValueError(f"shape is {shape!r}: give one of {', '.join(_SHAPES)}")
        if not 0 <= final < 1:
            raise ValueError(f"final is {final}: give a share of the rate, from 0 to below 1")
        self.total_iters, self.shape, self.final = total_iters, shape, final
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Return the rates for the current count."""
        into_decay = self.last_epoch - (self.total_iters - self.decay_iters)
        left = _SHAPES[self.shape](min(1.0, max(0, into_decay) / self.decay_iters))
        return [rate * (self.final + (1.0 - self.final) * left) for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count, "_last_lr": self._last_lr}


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}


def is_known(target: str, code: Path | None) -> bool:
    """Return whether a scheduler is torch's or Lockstep's, which use only the optimizer's groups."""
    scheduler = component.locate(target, namespaces=NAMESPACES, code=code)
    return getattr(scheduler, "__module__", "").startswith(("torch.optim", "runtime."))


def length_argument(scheduler: Any, args: Mapping[str, Any]) -> str | None:
    """Return the required argument for the run's length if there is one and it was left out."""
    for name, parameter in inspect.signature(scheduler).parameters.items():
        if name in LENGTHS and name not in args and parameter.default is parameter.empty:
            return name
    if getattr(scheduler, "__name__", "") == "OneCycleLR" and not {"total_steps", "epochs"} & set(args):
        return "total_steps"
    return None


def check(
    target: str, args: Mapping[str, Any], *, code: Path | None = None, filled_in: Sequence[str] = ()
) -> list[ComponentError]:
    """Look up a scheduler and its inner schedulers, and check all arguments; nothing is called.

    Args:
        filled_in: arguments that the runtime adds if they are left out.
    """
    try:
        scheduler = component.locate(target, namespaces=NAMESPACES, code=code)
    except ComponentError as mistake:
        return [mistake]
    mistakes = [
        ComponentError(
            f"{key!r} is text, and text is not evaluated; name a function: {{target: 'mine:f'}}", ("args", key)
        )
        for key in _FUNCTIONS
        if isinstance(args.get(key), str)
    ]
    if not _is_composite(scheduler):
        options: dict[str, Any] = {"code": code, "positional": 1, "filled_in": filled_in}
        nested = _nested_schedulers(args, code)
        for path, inner in nested:
            mistakes += [
                ComponentError(m.what, path + m.path) for m in check(inner["target"], inner["args"] or {}, code=code)
            ]
        others = _replaced(args, {path: None for path, _ in nested})
        return mistakes + component.check(target, others, namespaces=NAMESPACES, **options)
    mistakes += component.check_arguments(scheduler, args, positional=0 if _takes_optimizer_by_name(scheduler) else 1)
    for path, inner_target, inner_args in _inner(args, mistakes):
        if scheduler is SequentialLR and _is(ChainedScheduler, inner_target, code):
            message = (
                "cannot be a ChainedScheduler: torch's SequentialLR starts it at a wrong count. Instead, use a "
                "ChainedScheduler of SequentialLRs"
            )
            mistakes.append(ComponentError(message, (*path, "target")))
        mistakes += [ComponentError(m.what, path + m.path) for m in check(inner_target, inner_args, code=code)]
    return mistakes


def build(target: str, args: Mapping[str, Any], optimizer: Optimizer, *, code: Path | None = None) -> Any:
    """Build a scheduler and its inner schedulers on the bare optimizer.

    Raises:
        ComponentError: a scheduler cannot be located, or its constructor raised.
    """
    scheduler = component.locate(target, namespaces=NAMESPACES, code=code)
    if not _is_composite(scheduler):
        built: dict[tuple[str, ...], Any] = {}
        for path, inner in _nested_schedulers(args, code):
            try:
                built[path] = build(inner["target"], inner["args"] or {}, optimizer, code=code)
            except ComponentError as mistake:
                raise ComponentError(mistake.what, path + mistake.path) from mistake.__cause__
        return component.build(target, _replaced(args, built), optimizer, namespaces=NAMESPACES, code=code)
    if scheduler is SequentialLR:
        listed, milestones = _flattened_sequence(args, code)
        args = {**args, "milestones": milestones}
    else:
        listed = _inner(args, [])
    inner_schedulers = []
    for path, inner_target, inner_args in listed:
        try:
            inner_schedulers.append(build(inner_target, inner_args, optimizer, code=code))
        except ComponentError as mistake:
            raise ComponentError(mistake.what, path + mistake.path) from mistake.__cause__
    arguments = {**args, _INNER: inner_schedulers}
    if _takes_optimizer_by_name(scheduler):
        return component.build(target, {**arguments, "optimizer": optimizer}, namespaces=NAMESPACES, code=code)
    return component.build(target, arguments, optimizer, namespaces=NAMESPACES, code=code)


def _nested_schedulers(args: Mapping[str, Any], code: Path | None) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Return path and component of each scheduler in a scheduler's arguments, which are built on the optimizer too."""
    schedulers = []
    for path, inner in component.nested_components(args, ("args",)):
        try:
            located = component.locate(inner["target"], code=code) if "args" in inner else None
        except ComponentError:
            continue  # reported with the other arguments
        if inspect.isclass(located) and issubclass(located, LRScheduler):
            schedulers.append((path, inner))
    return schedulers


def _replaced(args: Mapping[str, Any], values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Copy arguments, with the values at some paths replaced; a path begins with ``args``."""

    def copy(value: Any, path: tuple[str, ...]) -> Any:
        if path in values:
            return values[path]
        if isinstance(value, Mapping):
            return {key: copy(inner, (*path, str(key))) for key, inner in value.items()}
        return [copy(v, (*path, str(n))) for n, v in enumerate(value)] if isinstance(value, list) else value

    return {key: copy(value, ("args", key)) for key, value in args.items()}


def _flattened_sequence(args: Mapping[str, Any], code: Path | None) -> tuple[list[_InnerScheduler], Any]:
    """Return the schedulers and milestones of a SequentialLR, with nested sequences flattened.

    Torch counts a nested sequence wrongly if it comes first, and raises if it comes later (2.11 to 2.13).
    """
    inner, ends = _inner(args, []), args.get("milestones")
    if not isinstance(ends, list) or not all(type(end) is int for end in ends) or len(ends) != len(inner) - 1:
        return inner, ends  # torch reports what is wrong
    listed: list[_InnerScheduler] = []
    milestones: list[int] = []
    for (path, target, target_args), start, end in zip(inner, [0, *ends], [*ends, math.inf], strict=True):
        milestones += [start] if start else []
        if not _is(SequentialLR, target, code):
            listed.append((path, target, target_args))
            continue
        nested, nested_milestones = _flattened_sequence(target_args, code)
        before_end = [start + milestone for milestone in nested_milestones if start + milestone < end]
        milestones += before_end
        for inner_path, inner_target, inner_args in nested[: len(before_end) + 1]:
            listed.append((path + inner_path, inner_target, inner_args))
    return listed, milestones


def _is(scheduler: type, target: str, code: Path | None) -> bool:
    try:
        return component.locate(target, namespaces=NAMESPACES, code=code) is scheduler
    except ComponentError:
        return False


def _is_composite(scheduler: Any) -> bool:
    return callable(scheduler) and _INNER in inspect.signature(scheduler).parameters


def _takes_optimizer_by_name(scheduler: Any) -> bool:
    return next(iter(inspect.signature(scheduler).parameters)) != "optimizer"


def _inner(args: Mapping[str, Any], mistakes: list[ComponentError]) -> list[_InnerScheduler]:
    """Return path, target and arguments of the inner schedulers; append a mistake for each invalid one."""
    listed = args.get(_INNER, [])
    if not isinstance(listed, list):
        mistakes.append(ComponentError("must be a list of schedulers, each {target: …, args: {…}}", ("args", _INNER)))
        return []
    schedulers: list[_InnerScheduler] = []
    for number, value in enumerate(listed):
        path = ("args", _INNER, str(number))
        if (
            isinstance(value, Mapping)
            and set(value) <= {"target", "args"}
            and isinstance(value.get("target"), str)
            and isinstance(value.get("args") or {}, Mapping)
        ):
            schedulers.append((path, value["target"], value.get("args") or {}))
        else:
            mistakes.append(ComponentError("must be a scheduler: {target: …, args: {…}}", path))
    return schedulers
