"""The blocks of a model: the modules that are gathered, recomputed or compiled one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from runtime.config.component import ComponentError
from runtime.wording import did_you_mean


def blocks_of_classes(module: nn.Module, classes: Sequence[str]) -> list[nn.Module]:
    """Return the modules of given classes, inner ones first.

    Raises:
        ComponentError: a class has no module.
    """
    names = {type(part).__name__ for part in module.modules()}
    for name in classes:
        if name not in names:
            parts = {type(part).__name__ for part in module.modules() if any(True for _ in part.children())}
            listed = ", ".join(sorted(parts - {"TrainingModule"}))
            raise ComponentError(
                f"no module of the model is a {name!r}{did_you_mean(name, names)}. Its modules with parts are: {listed}"
            )
    return [part for part in reversed(list(module.modules())) if type(part).__name__ in classes]


def blocks_of_size(module: nn.Module, min_parameters: int) -> list[nn.Module]:
    """Return the smallest modules with parts that hold at least so many parameters, the module itself excepted."""

    def within(part: nn.Module) -> Iterator[nn.Module]:
        for child in part.children():
            if sum(p.numel() for p in child.parameters()) < min_parameters:
                continue
            inner = list(within(child))
            if inner:
                yield from inner
            elif _is_block(child):
                yield child

    return list(dict.fromkeys(within(module)))


def checkpoint_activations(blocks: Sequence[nn.Module]) -> None:
    """Let blocks keep their inputs alone, and run forward again in the backward pass, under the same random numbers.

    The forward method is replaced rather than the module wrapped, so that parameters keep their names.
    """
    for block in blocks:
        _replace_forward(block, partial(checkpoint, block.forward, use_reentrant=False))


def compile_blocks(blocks: Sequence[nn.Module], compiled: Callable[[Any], Any]) -> None:
    """Compile blocks one by one: equal ones share their code, and what a strategy does around a block stays outside.

    Args:
        compiled: torch.compile with its options.
    """
    for block in blocks:
        _replace_forward(block, compiled(block.forward))


def _replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    block.forward = forward


def _is_block(module: nn.Module) -> bool:
    """Tell whether a module has parts and a forward method of its own, which lists of modules have not."""
    has_parts = any(True for _ in module.children())
    return has_parts and not isinstance(module, nn.ModuleList | nn.ModuleDict)
