"""Builds the model: pretrained weights, activation checkpointing and compilation included."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from runtime.build.component import Component
from runtime.checkpoints.pretrained import WeightsReport, load_weights, weights_digest
from runtime.checkpoints.serialization import split_state
from runtime.config.component import ComponentError, described
from runtime.config.learning import WeightsSection
from runtime.config.locations import Locations
from runtime.config.strategy import CompileSection
from runtime.errors import CheckpointError, DataError
from runtime.files import PACKAGE, existing
from runtime.objective import TrainingModule
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything
from runtime.strategies.blocks import blocks_of_classes, checkpoint_activations, compile_blocks

_CPU = torch.device("cpu")


def build_model(model: Component, *, seed: int) -> nn.Module:
    """Build the model on the CPU under the run's seed, so that it is the same on every rank."""
    with preserved_random_state(_CPU):
        seed_everything(derive(seed, Purpose.INITIALIZATION), _CPU)
        built = model.build()
    if not isinstance(built, nn.Module):
        raise model.error(f"is a {type(built).__name__}, not a torch.nn.Module", "target")
    _refuse_lazy(model, built)
    return built


def refuse_sparse(model: Component, built: nn.Module) -> None:
    """Refuse embeddings with sparse gradients, which are not checked for divergence, clipped or reduced over processes."""
    sparse = [
        name or "the model itself"
        for name, part in built.named_modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
    ]
    if sparse:
        raise model.error(
            f"{', '.join(sparse)}: gradients of embeddings with sparse=True are not reduced; build with sparse=False"
        )


def _refuse_lazy(model: Component, built: nn.Module) -> None:
    lazy = [
        f"{name or 'the model itself'} ({type(part).__name__})"
        for name, part in built.named_modules()
        if any(is_lazy(value) for value in (*part._parameters.values(), *part._buffers.values()))
    ]
    if lazy:
        raise model.error(
            f"{', '.join(lazy)}: lazy modules have no shapes before a first forward pass, but weights are counted, sharded "
            "and loaded earlier; give the number of inputs (nn.Linear(in_features, …))"
        )


def rebuild_blocks(
    model: nn.Module, *, recomputed: list[str], wrapped: list[str], compiled: CompileSection | None, where: Locations
) -> None:
    """Apply activation checkpointing and torch.compile to a model or its blocks.

    Args:
        recomputed: classes of blocks (``model.checkpoint_activations``).
        wrapped: classes of blocks that must exist (``strategy.fsdp.wrap``).

    Raises:
        ConfigurationError: the model has no such blocks, or the compiler's options are invalid.
    """
    with where.errors_at("strategy", "fsdp", "wrap"):
        _blocks(model, wrapped)
    with where.errors_at("model", "checkpoint_activations"):
        blocks = _blocks(model, recomputed)
    checkpoint_activations(blocks)
    if compiled is None:
        return
    from torch._dynamo.backends.registry import lookup_backend  # the import takes a second, as compiling does anyway

    options: dict[str, Any] = {
        "backend": compiled.backend,
        "mode": compiled.mode,
        "dynamic": compiled.dynamic,
        "fullgraph": compiled.fullgraph,
    }
    try:
        lookup_backend(compiled.backend)
        torch.compile(nn.Identity(), **options)  # compiles nothing until it is called
    except Exception as error:
        known = ", ".join(torch.compiler.list_backends())
        what = f"{described(error).splitlines()[0]}; backends here: {known}"
        raise where.error(("compile",), what) from error
    if compiled.blocks:
        with where.errors_at("compile", "blocks"):
            blocks = _blocks(model, compiled.blocks)
        compile_blocks(blocks, partial(torch.compile, **options))
    else:
        model.compile(**options)


def _blocks(model: nn.Module, classes: list[str]) -> list[nn.Module]:
    try:
        return blocks_of_classes(model, classes)
    except ComponentError as mistake:
        raise ComponentError(mistake.what, ()) from mistake  # report the list's key, not one within it


def load_pretrained(model: nn.Module, section: WeightsSection | None, where: Locations) -> WeightsReport | None:
    """Load the pretrained weights, if any, and return a report of what was loaded."""
    if section is None:
        return None
    with where.errors_at("model", "weights"):
        return load_weights(model, section, _pretrained_file(section, where))


def pretrained_digest(section: WeightsSection | None, where: Locations) -> str | None:
    """Return the digest of the pretrained weights; None if there are none, or their file is missing."""
    if section is None:
        return None
    try:
        return weights_digest(_pretrained_file(section, where))
    except ComponentError:
        return None


def _pretrained_file(section: WeightsSection, where: Locations) -> Path:
    if not section.file.startswith(PACKAGE):
        return where.beside(section.file)
    try:
        return existing(section.file, folder=not Path(section.file).suffix, provided_by=section.provided_by)
    except DataError as error:
        raise ComponentError(str(error), ("file",)) from error


def refuse_extra_state(module: TrainingModule, where: Locations) -> None:
    """Refuse extra state that cannot be saved, before training starts."""
    for prefix, part in (("model", module.model), ("objective", module.objective)):
        for name, value in part.state_dict().items():
            if isinstance(value, torch.Tensor):
                continue
            try:
                split_state(value)
            except CheckpointError as error:
                owner = part.get_submodule(name.rpartition(".")[0])
                what = (
                    f"{type(owner).__name__} ({name.rpartition('.')[0] or 'the whole'}) has extra state (get_extra_state) "
                    f"that cannot be saved: {error}"
                )
                raise where.error((prefix,), what) from error
