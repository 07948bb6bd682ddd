"""Verify the first checkpoint: a newly built model and optimizer that load it must behave as the running ones.

A model or an optimizer may keep state outside its state dict: a counter, a generator, a running mean as a plain attribute. A
run resumed from a checkpoint would then silently differ. So the run's first checkpoint is loaded into new objects, and these
and copies of the running ones make the same evaluation and the same update.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.build.builder import Builder
from runtime.checkpoints.load import load_state
from runtime.checkpoints.run_state import RunState, load_module
from runtime.checks.attributes import attributes_with_tensors, differing_attributes
from runtime.checks.copies import copy_of, enough_memory
from runtime.checks.objective import mark_coupled
from runtime.checks.traces import left_as_it_was
from runtime.distributed.collectives import gather_bytes
from runtime.objective import TrainingModule
from runtime.optimization.combined import load_exactly
from runtime.optimization.optimizer_eval_mode import begin_training, load_training_weights
from runtime.optimization.trial_steps import trial_step
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything
from runtime.state.adopted_layouts import adopt_layouts
from runtime.state.local_weights import WholeWeights
from runtime.strategies import Strategy
from runtime.strategies.placement import to_device
from runtime.training.buffer_values import same_bits

_CURE = "Keep such state in a buffer (register_buffer) or return it from get_extra_state; an optimizer's belongs in its state"
_RELATIVE = 1e-3  # tolerance between two passes if kernels are not deterministic


def verify_checkpoint(
    builder: Builder,
    strategy: Strategy,
    state: RunState,
    *,
    saved: Callable[[], Path | None],
    batch: Any,
    warn: Callable[[str], None],
    log: Callable[[str], None],
) -> None:
    """Compare a loaded checkpoint with the running state, which stays unchanged. Collective: every rank must call this.

    Args:
        saved: waits until the checkpoint is on disk and returns it. Collective.
        batch: of one slot.
        warn: called with one line on what the checkpoint lacks.
        log: called with the reason if nothing was compared.
    """
    values = builder.values
    if not strategy.state_io.held_whole or (values.compile is not None and values.compile.blocks):
        what = "compiled blocks" if strategy.state_io.held_whole else f"strategy.kind: {values.strategy.kind}"
        log(f"The first checkpoint is not verified with {what}; to check it, start a run with ddp and without compile.")
        return
    report = {"problem": "", "differences": []}
    if _on_all(strategy, enough_memory(state.module, state.optimizer, strategy.device)):
        path = saved()
        try:
            if path is not None:
                report["differences"] = _differences(builder, strategy, state, path, batch)
        except Exception as error:  # user code that cannot be copied, or built twice, must not end a run
            first = str(error).strip().split("\n", maxsplit=1)[0]
            report["problem"] = f"{type(error).__name__}: {first[:200]}"
        finally:
            strategy.discard()
    else:
        report["problem"] = "not enough memory for a second model and optimizer"
    reports = [json.loads(reply) for reply in gather_bytes(json.dumps(report).encode(), strategy.device)]
    differences = list(dict.fromkeys(line for other in reports for line in other["differences"]))
    problem = next((other["problem"] for other in reports if other["problem"]), "")
    if differences:
        warn(f"a run resumed from a checkpoint would differ from this one: {'; '.join(differences)}. {_CURE}")
    elif problem:
        log(f"The first checkpoint was not verified ({problem}).")


def _differences(builder: Builder, strategy: Strategy, state: RunState, path: Path, batch: Any) -> list[str]:
    device, key = strategy.device, derive(builder.values.seed, Purpose.SLOT, state.progress.step, 0)
    batch = to_device(batch, strategy.device)
    # A copy's hooks may still write to the original's attributes: they were created with it.
    with preserved_random_state(device), left_as_it_was(state.module, training=True):
        running, running_optimizer = copy_of(state.module, state.optimizer)
        built, built_optimizer = _built(builder, strategy, state, path)
        with_tensors = attributes_with_tensors(built)
        before, after = (
            _acted(module, optimizer, strategy, batch, key)
            for module, optimizer in ((running, running_optimizer), (built, built_optimizer))
        )
    results = [
        f"{what} is {float(one.double().sum()):.9g}, and {float(other.double().sum()):.9g} after loading"
        for what, one, other in zip(("the evaluation's loss", "one slot's loss"), before, after, strict=True)
        if not _equal(one, other)
    ]
    weights = dict(built.named_parameters())
    differing = [name for name, p in running.named_parameters() if not _equal(p, weights[name])]
    if differing and not results:
        results.append(f"{differing[0].removeprefix('model.')} differs after one update")
    attributes = differing_attributes(
        running, built, running_optimizer, built_optimizer, with_tensors=with_tensors, caches=bool(results)
    )
    return [*attributes, *results]


def _built(builder: Builder, strategy: Strategy, state: RunState, path: Path) -> tuple[TrainingModule, Optimizer]:
    """Build module and optimizer as a start does, and load the checkpoint."""
    model = builder.model()
    if builder.values.batch_norm == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    module = strategy.place(TrainingModule(model, builder.objective()))
    freezing = builder.freezing(module)
    freezing.unfreeze_all()
    optimizer = builder.optimizer(module)
    begin_training(optimizer)
    freezing.apply(0)
    freezing.apply(state.progress.cursor.epoch)

    def load(part: nn.Module, values: Any) -> None:
        part.load_state_dict(values)
        adopt_layouts(part, values)

    stored, training = load_state(path)
    load_module(load, module, stored, training["objective"], training["buffers"])
    load_exactly(optimizer, training["optimizer"])
    load_training_weights(training["weights"], WholeWeights(module))
    mark_coupled(module.objective, training["coupled"])  # as a resumed run does
    return module, optimizer


def _acted(
    module: TrainingModule, optimizer: Optimizer, strategy: Strategy, batch: Any, key: int
) -> tuple[Tensor, Tensor]:
    """Evaluate a batch, train on it and update; return both losses."""
    module.eval()
    seed_everything(key, strategy.device)
    with torch.no_grad(), strategy.autocast():
        evaluated = module(batch).sum.detach().clone()
    module.train()
    seed_everything(key, strategy.device)
    with strategy.autocast():
        loss = module(batch).sum
    loss.sum().backward()
    trial_step(optimizer)
    return evaluated, loss.detach().clone()


def _equal(one: Tensor, other: Tensor) -> bool:
    if same_bits(one, other):
        return True
    if torch.are_deterministic_algorithms_enabled() or one.shape != other.shape:
        return False
    return torch.allclose(one.detach(), other.detach().to(one.dtype), rtol=_RELATIVE, atol=1e-6, equal_nan=True)


def _on_all(strategy: Strategy, here: bool) -> bool:
    return all(answer == b"1" for answer in gather_bytes(b"1" if here else b"0", strategy.device))
