"""Torch's schedulers by name, schedulers made of schedulers, and Lockstep's own."""

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
_Within = tuple[tuple[str, ...], str, Mapping[str, Any]]  # path, target and arguments of a scheduler in another


class WarmupStableDecay(LRScheduler):
    """A constant rate that decays at the end; the warm-up before it is the configuration's ``warmup_steps``.

    Its state is the count alone: a run that was told to be longer, while it was stable, stays stable for longer. Source: Hu
    et al., "MiniCPM" (2024), section 4; the square root from Hägele et al. (2024), section 4.

    Args:
        optimizer: whose rates change.
        total_iters: length of stable phase and decay, in what the schedule counts.
        decay: how much of it is decay: a whole number counts; a fraction is a share of ``total_iters``, rounded up.
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
                f"decay is {decay}: give a whole number from 1 to total_iters ({total_iters}), or a share above 0, at most 1.0"
            )
        if shape not in _SHAPES:
            raise ValueError(f"shape is {shape!r}: give one of {', '.join(_SHAPES)}")
        if not 0 <= final < 1:
            raise ValueError(f"final is {final}: give a share of the rate, from 0 to below 1")
        self.total_iters, self.shape, self.final = total_iters, shape, final
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Return the rates of the present count."""
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
    """Tell whether a scheduler is one of torch's or Lockstep's, which look at nothing of an optimizer but its groups."""
    found = component.locate(target, namespaces=NAMESPACES, code=code)
    return getattr(found, "__module__", "").startswith(("torch.optim", "runtime."))


def length_argument(scheduler: Any, args: Mapping[str, Any]) -> str | None:
    """Return the required argument that stands for the run's length and was left out, if there is one."""
    for name, parameter in inspect.signature(scheduler).parameters.items():
        if name in LENGTHS and name not in args and parameter.default is parameter.empty:
            return name
    if getattr(scheduler, "__name__", "") == "OneCycleLR" and not {"total_steps", "epochs"} & set(args):
        return "total_steps"
    return None


def check(
    target: str, args: Mapping[str, Any], *, code: Path | None = None, filled_in: Sequence[str] = ()
) -> list[ComponentError]:
    """Look up a scheduler, and those that it is made of, and check all arguments; nothing is called.

    Args:
        filled_in: arguments that the runtime adds by name if they are left out.
    """
    try:
        found = component.locate(target, namespaces=NAMESPACES, code=code)
    except ComponentError as mistake:
        return [mistake]
    mistakes = [
        ComponentError(
            f"{key!r} is text, and no text is evaluated; name a function: {{target: 'mine:f'}}", ("args", key)
        )
        for key in _FUNCTIONS
        if isinstance(args.get(key), str)
    ]
    if not _is_made_of_schedulers(found):
        options: dict[str, Any] = {"code": code, "positional": 1, "filled_in": filled_in}
        nested = _nested_schedulers(args, code)
        for path, inner in nested:
            mistakes += [
                ComponentError(m.what, path + m.path) for m in check(inner["target"], inner["args"] or {}, code=code)
            ]
        others = _replaced(args, {path: None for path, _ in nested})
        return mistakes + component.check(target, others, namespaces=NAMESPACES, **options)
    mistakes += component.check_arguments(found, args, positional=0 if _takes_optimizer_by_name(found) else 1)
    for path, inner_target, inner_args in _inner(args, mistakes):
        if found is SequentialLR and _is(ChainedScheduler, inner_target, code):
            what = (
                "cannot be a ChainedScheduler: torch's SequentialLR begins it at another count. Chain sequences instead: "
                "ChainedScheduler of one SequentialLR each"
            )
            mistakes.append(ComponentError(what, (*path, "target")))
        mistakes += [ComponentError(m.what, path + m.path) for m in check(inner_target, inner_args, code=code)]
    return mistakes


def build(target: str, args: Mapping[str, Any], optimizer: Optimizer, *, code: Path | None = None) -> Any:
    """Build a scheduler, and those that it is made of, on the bare optimizer.

    Raises:
        ComponentError: it cannot be located, or raised.
    """
    found = component.locate(target, namespaces=NAMESPACES, code=code)
    if not _is_made_of_schedulers(found):
        built: dict[tuple[str, ...], Any] = {}
        for path, inner in _nested_schedulers(args, code):
            try:
                built[path] = build(inner["target"], inner["args"] or {}, optimizer, code=code)
            except ComponentError as mistake:
                raise ComponentError(mistake.what, path + mistake.path) from mistake.__cause__
        return component.build(target, _replaced(args, built), optimizer, namespaces=NAMESPACES, code=code)
    if found is SequentialLR:
        listed, milestones = _in_sequence(args, code)
        args = {**args, "milestones": milestones}
    else:
        listed = _inner(args, [])
    made = []
    for path, inner_target, inner_args in listed:
        try:
            made.append(build(inner_target, inner_args, optimizer, code=code))
        except ComponentError as mistake:
            raise ComponentError(mistake.what, path + mistake.path) from mistake.__cause__
    arguments = {**args, _INNER: made}
    if _takes_optimizer_by_name(found):
        return component.build(target, {**arguments, "optimizer": optimizer}, namespaces=NAMESPACES, code=code)
    return component.build(target, arguments, optimizer, namespaces=NAMESPACES, code=code)


def _nested_schedulers(args: Mapping[str, Any], code: Path | None) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Return the schedulers within the arguments of one, which are built on the optimizer as well."""
    found = []
    for path, inner in component.nested_components(args, ("args",)):
        try:
            located = component.locate(inner["target"], code=code) if "args" in inner else None
        except ComponentError:
            continue  # told with the other arguments
        if inspect.isclass(located) and issubclass(located, LRScheduler):
            found.append((path, inner))
    return found


def _replaced(args: Mapping[str, Any], values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Copy arguments with other values in some places; a path begins with ``args``."""

    def copy(value: Any, path: tuple[str, ...]) -> Any:
        if path in values:
            return values[path]
        if isinstance(value, Mapping):
            return {key: copy(inner, (*path, str(key))) for key, inner in value.items()}
        return [copy(v, (*path, str(n))) for n, v in enumerate(value)] if isinstance(value, list) else value

    return {key: copy(value, ("args", key)) for key, value in args.items()}


def _in_sequence(args: Mapping[str, Any], code: Path | None) -> tuple[list[_Within], Any]:
    """Return the schedulers of a SequentialLR and its milestones, with those of sequences within it in their place.

    Torch's own counts a sequence within a sequence wrongly if it comes first, and raises if it comes later (2.11 to 2.13).
    """
    inner, ends = _inner(args, []), args.get("milestones")
    if not isinstance(ends, list) or not all(type(end) is int for end in ends) or len(ends) != len(inner) - 1:
        return inner, ends  # torch says what is wrong
    listed: list[_Within] = []
    milestones: list[int] = []
    for (path, target, its_args), start, end in zip(inner, [0, *ends], [*ends, math.inf], strict=True):
        milestones += [start] if start else []
        if not _is(SequentialLR, target, code):
            listed.append((path, target, its_args))
            continue
        within, its_milestones = _in_sequence(its_args, code)
        before_end = [start + milestone for milestone in its_milestones if start + milestone < end]
        milestones += before_end
        listed += [(path + inner_path, its, given) for inner_path, its, given in within[: len(before_end) + 1]]
    return listed, milestones


def _is(scheduler: type, target: str, code: Path | None) -> bool:
    try:
        return component.locate(target, namespaces=NAMESPACES, code=code) is scheduler
    except ComponentError:
        return False


def _is_made_of_schedulers(scheduler: Any) -> bool:
    return callable(scheduler) and _INNER in inspect.signature(scheduler).parameters


def _takes_optimizer_by_name(scheduler: Any) -> bool:
    return next(iter(inspect.signature(scheduler).parameters)) != "optimizer"


def _inner(args: Mapping[str, Any], mistakes: list[ComponentError]) -> list[_Within]:
    """Return path, target and arguments of the schedulers within; add to the mistakes what is none."""
    listed = args.get(_INNER, [])
    if not isinstance(listed, list):
        mistakes.append(ComponentError("is a list of schedulers, each {target: …, args: {…}}", ("args", _INNER)))
        return []
    found: list[_Within] = []
    for number, value in enumerate(listed):
        path = ("args", _INNER, str(number))
        if (
            isinstance(value, Mapping)
            and set(value) <= {"target", "args"}
            and isinstance(value.get("target"), str)
            and isinstance(value.get("args") or {}, Mapping)
        ):
            found.append((path, value["target"], value.get("args") or {}))
        else:
            mistakes.append(ComponentError("is a scheduler: {target: …, args: {…}}", path))
    return found
