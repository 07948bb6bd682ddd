"""A model's blocks: submodules that are gathered (FSDP), recomputed (activation checkpointing) or compiled one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from runtime.config.component import ComponentError
from runtime.wording import did_you_mean


def blocks_of_classes(module: nn.Module, classes: Sequence[str]) -> list[nn.Module]:
    """Return the submodules of the named classes, inner ones first.

    Raises:
        ComponentError: no submodule is of one of the classes.
    """
    names = {type(part).__name__ for part in module.modules()}
    for name in classes:
        if name not in names:
            containers = {type(part).__name__ for part in module.modules() if any(True for _ in part.children())}
            listed = ", ".join(sorted(containers - {"TrainingModule"}))
            raise ComponentError(
                f"no module of the model is a {name!r}{did_you_mean(name, names)}. "
                f"Classes of its modules that have submodules: {listed}"
            )
    return [part for part in reversed(list(module.modules())) if type(part).__name__ in classes]


def blocks_of_size(module: nn.Module, min_parameters: int) -> list[nn.Module]:
    """Return the smallest submodules that have children and at least ``min_parameters`` elements; never ``module`` itself."""

    def blocks_in(part: nn.Module) -> Iterator[nn.Module]:
        for child in part.children():
            if sum(p.numel() for p in child.parameters()) < min_parameters:
                continue
            inner = list(blocks_in(child))
            if inner:
                yield from inner
            elif _is_block(child):
                yield child

    return list(dict.fromkeys(blocks_in(module)))


def checkpoint_activations(blocks: Sequence[nn.Module]) -> None:
    """Apply activation checkpointing to blocks, with the same random numbers in the recomputation.

    Replaces the forward method instead of wrapping the module, so that parameters keep their names.
    """
    for block in blocks:
        _replace_forward(block, partial(checkpoint, block.forward, use_reentrant=False))


def compile_blocks(blocks: Sequence[nn.Module], compiler: Callable[[Any], Any]) -> None:
    """Compile blocks one by one: equal ones share code, and a strategy's hooks around a block stay outside.

    Args:
        compiler: torch.compile with its options.
    """
    for block in blocks:
        _replace_forward(block, compiler(block.forward))


def _replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    block.forward = forward


def _is_block(module: nn.Module) -> bool:
    """Return whether a module has children and a forward method, which module lists and dictionaries lack."""
    has_children = any(True for _ in module.children())
    return has_children and not isinstance(module, nn.ModuleList | nn.ModuleDict)
