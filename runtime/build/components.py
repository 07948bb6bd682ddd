"""From sections of the configuration to checked and built parts; every mistake comes back with file, line and key."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from runtime.build import sources
from runtime.build.objective import OBJECTIVES, losses_of, refused_loss
from runtime.build.observers import observer_sections
from runtime.build.optimizer import length_arguments
from runtime.build.own_trackers import tracker_mistakes
from runtime.build.resolver import build as _build
from runtime.build.resolver import function as _function
from runtime.build.resolver import wrong as _wrong
from runtime.checkpoints.pretrained import WeightsReport, load_weights, weights_digest
from runtime.checkpoints.serialization import split_state
from runtime.config import component
from runtime.config.component import ComponentError, described
from runtime.config.file import LoadedConfiguration
from runtime.config.learning import Weights
from runtime.config.metric_tasks import incomplete
from runtime.config.types import ComponentSection
from runtime.data.batches import Sharing
from runtime.data.fields import Fields
from runtime.data.loading import MakeLoader, loader_factory
from runtime.data.samples import Samples
from runtime.data.streams import StreamSamples
from runtime.data.training_data import MappedData, StreamedData, TrainingData
from runtime.errors import CheckpointError, ConfigurationError, DataError, EvaluationError, MissingDependencyError
from runtime.files import PACKAGE, existing
from runtime.objective import TrainingModule
from runtime.optimization import schedulers
from runtime.optimization.optimizer import check_optimizer
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything
from runtime.strategies.blocks import blocks_of_classes, checkpoint_activations, compile_blocks

if TYPE_CHECKING:
    from torchmetrics import Metric

_CPU = torch.device("cpu")
MODELS = ("runtime.model_zoo",)
TRANSFORMS = ("runtime.data.transforms",)
COLLATES = ("runtime.data.collating",)
METRICS = (  # torchmetrics itself comes last: some of its own names are deprecated doubles of these
    "torchmetrics.classification",
    "torchmetrics.regression",
    "torchmetrics.retrieval",
    "torchmetrics.text",
    "torchmetrics.aggregation",
    "torchmetrics.clustering",
    "torchmetrics.nominal",
    "torchmetrics.segmentation",
    "torchmetrics.image",
    "torchmetrics",
)


def check_components(loaded: LoadedConfiguration) -> None:
    """Look up every target and compare all arguments with signatures; nothing is called, no device is touched.

    Raises:
        ConfigurationError: all mistakes together.
    """
    values = loaded.values
    component.add_code_folder(loaded.code)
    mistakes: list[tuple[tuple[str, ...], ComponentError]] = []

    def check(
        key: tuple[str, ...], section: ComponentSection | None, namespaces: Sequence[str] = (), **options: Any
    ) -> None:
        if section is not None:
            found = component.check(section.target, section.args, namespaces=namespaces, code=loaded.code, **options)
            mistakes.extend((key, mistake) for mistake in found)

    def check_function(key: tuple[str, ...], section: ComponentSection | None, namespaces: Sequence[str] = ()) -> None:
        """A function without arguments is handed on as it is, so its signature says nothing."""
        if section is None:
            return
        try:
            found = component.locate(section.target, namespaces=namespaces, code=loaded.code)
        except ComponentError as mistake:
            mistakes.append((key, mistake))
            return
        if section.args or inspect.isclass(found):
            check(key, section, namespaces)

    def check_sampler(key: tuple[str, ...], section: ComponentSection | None) -> None:
        if section is None:
            return
        try:
            given = 0 if sources.names_first_parameter(loaded, section) else 1
        except ComponentError as mistake:
            mistakes.append((key, mistake))
            return
        check(key, section, sources.SAMPLERS, positional=given)

    check(("model",), values.model, MODELS)
    for name in sources.SPLITS:
        split = sources.completed_section(loaded, name)
        check(sources.split_key(name), split, sources.NAMESPACES)
        transform = split.transform if split is not None else None
        check_function((*sources.split_key(name), "transform"), transform, TRANSFORMS)
    if values.data.split is not None:
        check_function(("data", "split", "transform"), values.data.split.transform, TRANSFORMS)
    check_function(("data", "collate"), values.data.collate, COLLATES)
    check_function(("data", "loader", "worker_init"), values.data.loader.worker_init)
    for key, where in sources.value_components(values.data):
        check_function(key, where)
    for name in ("sampler", "batch_sampler"):
        check_sampler(("data", name), getattr(values.data, name))
    for key, loss in losses_of(loaded):
        check(key, loss, OBJECTIVES)
        mistakes.extend((key, mistake) for mistake in refused_loss(loaded, loss))
    mistakes += [(("optimizer",), mistake) for mistake in check_optimizer(values.optimizer, loaded.code)]
    if values.schedule is not None and values.schedule.target is not None:
        target, args, filled_in = values.schedule.target, values.schedule.args, length_arguments(loaded)
        found = schedulers.check(target, args, code=loaded.code, filled_in=filled_in)
        mistakes.extend((("schedule",), mistake) for mistake in found)
    for key, observer in observer_sections(loaded):
        check_function(key, observer)
    for name, metric in values.evaluation.metrics.items():
        mistakes += [(("evaluation", "metrics", name), m) for m in _metric_mistakes(loaded, name, metric)]
    for number, tracker in enumerate(values.reporting.trackers):
        mistakes += [(("reporting", "trackers", str(number)), m) for m in tracker_mistakes(tracker, loaded.code)]
    if values.reporting.wandb is not None and find_spec("wandb") is None:
        raise MissingDependencyError("wandb", "reporting.wandb", "wandb")
    if mistakes:
        raise ConfigurationError([loaded.problem(key + mistake.path, mistake.what) for key, mistake in mistakes])


def _metric_mistakes(loaded: LoadedConfiguration, name: str, metric: ComponentSection) -> list[ComponentError]:
    what = incomplete(name, metric)
    if what is not None:
        return [ComponentError(what, ())]
    return component.check(metric.target, metric.args, namespaces=METRICS, code=loaded.code)


def build_model(loaded: LoadedConfiguration) -> nn.Module:
    """Build the model, on the CPU and under the run's seed, so that every rank builds the same."""
    with preserved_random_state(_CPU):
        seed_everything(derive(loaded.values.seed, Purpose.INITIALIZATION), _CPU)
        model = _build(loaded, ("model",), loaded.values.model, namespaces=MODELS)
    if not isinstance(model, nn.Module):
        raise _wrong(loaded, ("model", "target"), f"is a {type(model).__name__}, not a torch.nn.Module")
    _refuse_lazy(loaded, model)
    return model


def refuse_sparse(loaded: LoadedConfiguration, model: nn.Module) -> None:
    """Refuse embeddings whose gradients are sparse, which are neither judged, clipped nor reduced over processes."""
    sparse = [
        name or "the model itself"
        for name, part in model.named_modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
    ]
    if sparse:
        what = f"{', '.join(sparse)}: gradients of embeddings with sparse=True are not reduced; build with sparse=False"
        raise _wrong(loaded, ("model",), what)


def _refuse_lazy(loaded: LoadedConfiguration, model: nn.Module) -> None:
    lazy = [
        f"{name or 'the model itself'} ({type(part).__name__})"
        for name, part in model.named_modules()
        if any(is_lazy(value) for value in (*part._parameters.values(), *part._buffers.values()))
    ]
    if lazy:
        what = (
            f"{', '.join(lazy)}: lazy modules know their size after a first forward pass only, and weights are counted, shared "
            "out and loaded before; give the number of inputs (nn.Linear(in_features, …))"
        )
        raise _wrong(loaded, ("model",), what)


def rebuild_blocks(loaded: LoadedConfiguration, model: nn.Module) -> None:
    """Let blocks of a model be recomputed in the backward pass, and it or its blocks be compiled, as configured.

    Raises:
        ConfigurationError: the model has no such blocks.
    """
    values, section = loaded.values, loaded.values.compile
    _blocks(loaded, model, ("strategy", "fsdp", "wrap"), values.strategy.fsdp.wrap)
    recomputed = _blocks(loaded, model, ("model", "checkpoint_activations"), values.model.checkpoint_activations)
    checkpoint_activations(recomputed)
    if section is None:
        return
    from torch._dynamo.backends.registry import lookup_backend  # takes a second, which compiling takes anyway

    options: dict[str, Any] = {
        "backend": section.backend,
        "mode": section.mode,
        "dynamic": section.dynamic,
        "fullgraph": section.fullgraph,
    }
    try:
        lookup_backend(section.backend)
        torch.compile(nn.Identity(), **options)  # compiles nothing before it is called
    except Exception as error:
        known = ", ".join(torch.compiler.list_backends())
        raise _wrong(loaded, ("compile",), f"{described(error).splitlines()[0]}; backends here: {known}") from error
    if section.blocks:
        compile_blocks(_blocks(loaded, model, ("compile", "blocks"), section.blocks), partial(torch.compile, **options))
    else:
        model.compile(**options)


def _blocks(loaded: LoadedConfiguration, model: nn.Module, key: tuple[str, ...], classes: list[str]) -> list[nn.Module]:
    try:
        return blocks_of_classes(model, classes)
    except ComponentError as mistake:
        raise _wrong(loaded, key, mistake.what) from mistake


def build_samples(
    loaded: LoadedConfiguration, name: str, *, batch_size: int, training: bool = False
) -> Samples | StreamSamples | None:
    """Build one split's data set, or None where the configuration has none.

    Args:
        batch_size: items that are cut up together, where it is a stream; where it yields batches and is not trained on, each is
            by itself.
        training: whether it is trained on.
    """
    source = sources.build_source(loaded, name)
    if source is None:
        return None
    data, split = loaded.values.data, sources.split_section(loaded, name)
    key = sources.split_key(name) if split is not None else ("data", "split")
    transform = split.transform if split is not None else data.split.transform if data.split is not None else None
    functions: dict[str, Any] = {
        "transform": _function(loaded, (*key, "transform"), transform, namespaces=TRANSFORMS) if transform else None,
        "collate": _function(loaded, ("data", "collate"), data.collate, namespaces=COLLATES) if data.collate else None,
    }
    if split is None or split.sharded_by is None:
        return Samples(source, seed=loaded.values.seed, **functions)
    if split.sharded_by == "dataset" and name != "train":
        raise _wrong(
            loaded, (*key, "sharded_by"), "must be runtime here: every sample counts once, on any number of ranks"
        )
    batches = split.yields == "batches"
    if batches:
        functions["collate"] = None  # which is for the splits that yield samples
        named = data.fields.model_dump() | {"target": sources.target_part(loaded)}
        functions |= {"batches": True, "fields": Fields(**named)}
    samples = StreamSamples(
        source,
        sharded_by=split.sharded_by,
        batch_size=1 if batches and not training else batch_size,
        seed=loaded.values.seed,
        drop_last=data.drop_last and training,
        **functions,
    )
    samples.may_differ = bool(loaded.values.resume.allow_changes) or loaded.values.checks == "off"
    return samples


def build_training_data(loaded: LoadedConfiguration) -> TrainingData:
    """Build what is trained on, in its order."""
    samples = build_samples(loaded, "train", batch_size=loaded.values.batch.global_size, training=True)
    assert samples is not None
    if isinstance(samples, Samples):
        return MappedData(samples, sources.build_order(loaded, samples.source))
    for name in ("shuffle", "sampler", "batch_sampler", "group_by_length", "budget", "balance", "weights"):
        if getattr(loaded.values.data, name):
            raise _wrong(
                loaded, ("data", name), "a stream has its own order; shuffle in the data set and leave this out"
            )
    return StreamedData(samples)


def build_loader(
    loaded: LoadedConfiguration,
    device: torch.device,
    closing: ExitStack | None = None,
    *,
    workers: int | None = None,
) -> MakeLoader:
    """Return the maker of loaders; memory is pinned by default where there is a GPU.

    Args:
        closing: where the same data is read again and again: workers then live until this is closed.
        workers: how many to start, where little is read. Default: as configured.
    """
    section = loaded.values.data.loader
    return loader_factory(
        num_workers=section.num_workers if workers is None else workers,
        prefetch_factor=section.prefetch_factor,
        pin_memory=device.type == "cuda" if section.pin_memory is None else section.pin_memory,
        timeout_seconds=section.timeout_seconds,
        start_method=section.start_method,
        worker_init=_function(loaded, ("data", "loader", "worker_init"), section.worker_init)
        if section.worker_init
        else None,
        closing=closing,
    )


def check_batch_norm(loaded: LoadedConfiguration, sharing: Sharing, *, smallest_batch: int) -> None:
    """Refuse synchronised BatchNorm where a rank would run a filler, whose samples would enter the others' statistics."""
    if loaded.values.batch_norm == "sync" and (sharing.slots % sharing.world_size or smallest_batch < sharing.slots):
        raise _wrong(
            loaded,
            ("batch_norm",),
            "sync needs a real slot on every rank in every forward pass: let the world size divide batch.slots "
            f"(now {sharing.slots}), and set data.drop_last if an epoch's last batch (now {smallest_batch} samples) is smaller",
        )


def load_pretrained(loaded: LoadedConfiguration, model: nn.Module) -> WeightsReport | None:
    """Load the weights that a run starts from, if the configuration names any, and return what became of them."""
    section = loaded.values.model.weights
    if section is None:
        return None
    try:
        return load_weights(model, section, _pretrained_file(loaded, section))
    except ComponentError as mistake:
        raise _wrong(loaded, ("model", "weights", *mistake.path), mistake.what) from mistake


def pretrained_digest(loaded: LoadedConfiguration) -> str | None:
    """Return the digest of the weights that a run starts from; None if there are none, or they are gone."""
    section = loaded.values.model.weights
    if section is None:
        return None
    try:
        return weights_digest(_pretrained_file(loaded, section))
    except ComponentError:
        return None


def _pretrained_file(loaded: LoadedConfiguration, section: Weights) -> Path:
    if not section.file.startswith(PACKAGE):
        return loaded.beside(section.file)
    try:
        return existing(section.file, folder=not Path(section.file).suffix, provided_by=section.provided_by)
    except DataError as error:
        raise ComponentError(str(error), ("file",)) from error


def build_metrics(loaded: LoadedConfiguration) -> dict[str, Metric]:
    """Build the metrics; each call makes new ones."""
    if not loaded.values.evaluation.metrics:
        return {}  # importing torchmetrics takes seconds
    from torchmetrics import Metric

    from runtime.evaluation.class_results import num_classes_of
    from runtime.evaluation.metric_inputs import feed_of

    metrics: dict[str, Metric] = {}
    for name, section in loaded.values.evaluation.metrics.items():
        key = ("evaluation", "metrics", name)
        metric = metrics[name] = _build(loaded, key, section, namespaces=METRICS)
        if not isinstance(metric, Metric):
            raise _wrong(loaded, (*key, "target"), "is not a torchmetrics.Metric")
        try:
            feed = feed_of(metric)
        except EvaluationError as error:
            raise _wrong(loaded, (*key, "target"), str(error)) from error
        if feed.needs_group and loaded.values.data.fields.group is None:
            what = f"{section.target} looks at each query by itself: say in data.fields.group which part of a batch names it"
            raise _wrong(loaded, key, what)
    names = loaded.values.evaluation.class_names  # those of the data are used where they fit
    sizes = {size for metric in metrics.values() if (size := num_classes_of(metric)) is not None}
    if names is not None and sizes != {len(names)}:
        found = " or ".join(map(str, sorted(sizes))) or "no"
        what = f"{len(names)} names, but the metrics tell {found} classes apart"
        raise _wrong(loaded, ("evaluation", "class_names"), what)
    return metrics


def refuse_extra_state(loaded: LoadedConfiguration, module: TrainingModule) -> None:
    """Refuse extra state that cannot be saved, before anything was trained."""
    for prefix, part in (("model", module.model), ("objective", module.objective)):
        for name, value in part.state_dict().items():
            if isinstance(value, torch.Tensor):
                continue
            try:
                split_state(value)
            except CheckpointError as error:
                owner = part.get_submodule(name.rpartition(".")[0])
                what = (
                    f"{type(owner).__name__} ({name.rpartition('.')[0] or 'the whole'}) has extra state (get_extra_state) that "
                    f"cannot be saved: {error}"
                )
                raise ConfigurationError([loaded.problem((prefix,), what)]) from error
