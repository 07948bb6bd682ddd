"""The configuration of a run: one class per section; defaults live here and nowhere else.

A key whose change between two starts of one run would change its result is ``exact``: resuming refuses it, naming the old
and the new value. The others are marked ``free``. Reading a file into these classes is ``file.py``. Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from runtime.config import yielded_batches
from runtime.config.data import BatchSection, DataSection, SplitSection
from runtime.config.learning import AveragingSection, ModelSection, ObjectiveSection, OptimizerSection, ScheduleSection
from runtime.config.reporting import ReportingSection
from runtime.config.signatures import class_name
from runtime.config.strategy import CompileSection, StrategySection
from runtime.config.types import (
    NAMED_BY_CLASS,
    ON_OR_OFF,
    TARGET_ALONE,
    Component,
    Every,
    Interval,
    Section,
    Shorthand,
    Time,
    free,
    refuse,
)


class EarlyStoppingSection(Section):
    """Ends a run whose evaluations no longer improve.

    The state of the best one is saved and kept, whatever ``checkpoint`` says. Raising ``patience`` continues the run.
    """

    metric: str = Field(json_schema_extra={"resume": "free"})
    """The validation result that is watched, such as ``loss`` or ``accuracy``."""
    mode: Literal["min", "max"] = Field(json_schema_extra={"resume": "free"})
    """Whether lower or higher is better."""
    patience: int = Field(3, ge=1, json_schema_extra={"resume": "free"})
    """Evaluations in a row without an improvement."""
    min_delta: float = Field(0.0, ge=0, json_schema_extra={"resume": "free"})
    """What a result must be better by than the best one to count as an improvement."""


class LimitSection(Section):
    """When the run is finished (exactly one of ``epochs`` and ``steps``), and how long one start of it may take."""

    epochs: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Passes over the training data."""
    steps: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Global batches."""
    time: Time | None = free(None)
    """Time this start may take, such as ``3h55m``; the run then saves, early enough to be done by then, and can go on later."""
    early_stopping: EarlyStoppingSection | None = free(None)
    """Finish before the limit once a result no longer improves. Default: off."""
    grace_seconds: float = Field(120.0, gt=0, json_schema_extra={"resume": "free"})
    """Longest time from being asked to stop until the last save is done; then the process leaves without one."""
    start_seconds: float = Field(600.0, ge=1, json_schema_extra={"resume": "free"})
    """How long the machines of ``lockstep train --nodes`` wait for one another at a start."""
    silence_seconds: float = Field(60.0, ge=1, json_schema_extra={"resume": "free"})
    """How long a rank may give no sign of life before the others leave and name it."""
    stall_seconds: float = Field(1800.0, ge=1, json_schema_extra={"resume": "free"})
    """How long the run may stand still (compiling takes minutes) before all leave, naming the rank that hangs."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        return refuse(self, ((self.epochs is None) == (self.steps is None), "", "give either 'epochs' or 'steps'"))


class EvaluationSection(Section):
    """When and how the validation data is evaluated."""

    every: Every = free(Interval(1, "epoch"))
    """How often."""
    micro_size: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Samples in one forward pass. Default: the largest slot of training."""
    metrics: Annotated[dict[str, Component], NAMED_BY_CLASS] = free({})
    """Name in the results to torchmetrics class. A list of classes names each by its class: ``MeanSquaredError`` is
    ``mean_squared_error``. ``task`` and ``num_classes`` are taken from objective and model where these say them."""
    class_names: Annotated[list[str], Field(min_length=1)] | None = free(None)
    """What tables, pictures and predictions call the classes. Default: what the training data calls them, else their
    numbers."""
    pictures: bool = free(True)
    """Draw confusion matrices and curves, where such metrics are asked for, into the run folder's ``figures``."""
    metrics_on_train: bool = free(False)
    """Also compute the metrics on the training batches, at every report (in training mode, before each update)."""


class PredictionSection(Section):
    """What ``lockstep predict`` predicts, and what it writes. Nothing here changes the training."""

    data: Annotated[SplitSection, TARGET_ALONE] | None = None
    """What is predicted; it needs no target. Default: ``data.test``."""
    columns: dict[str, str] = {}
    """Name in the file to what it holds: ``id``, ``index``, ``prediction``, ``class``, ``probability``, ``probabilities``,
    ``output``, ``top_classes``, ``top_probabilities``, what the objective's ``predicted`` gives besides, or ``column:NAME``,
    a part of the data. Several numbers
    a sample make several columns: ``{}`` in the name stands for the class or number, ``NAME_{}`` where it is left out.
    Default: id, prediction and, for classes, probability."""
    labels: list[str | int] = []
    """Names of the classes, in their order, for ``prediction`` to write. Default: evaluation.class_names, what the training
    data calls them, or the class's number."""
    top_k: int | None = Field(None, ge=1)
    """How many ``top_classes`` and ``top_probabilities`` there are, the best first."""
    sample_submission: str | None = None
    """CSV file whose columns, ids and order are kept, and whose values are replaced. Relative to the working folder. Its id
    is the column that holds ``id``. Default: the data set's own order."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        tops = [name for name, value in self.columns.items() if value in ("top_classes", "top_probabilities")]
        return refuse(
            self,
            (self.top_k and not tops, "top_k", "no column holds top_classes or top_probabilities"),
            (tops and not self.top_k, "top_k", f"say how many classes column {tops[:1]} holds"),
            (len({str(label) for label in self.labels}) < len(self.labels), "labels", "a name is there twice"),
        )


class SpikeSection(Section):
    """When a step's loss counts as a jump. Watching costs one small all-reduce and a wait for the device at each step."""

    sigma: float = Field(6.0, gt=0, json_schema_extra={"resume": "free"})
    """Standard deviations above the mean of the last losses."""
    window: int = Field(100, ge=2, json_schema_extra={"resume": "free"})
    """How many losses mean and standard deviation are taken of; nothing is judged before there are as many."""
    policy: Literal["stop", "skip", "rollback"] = free("stop")
    """What happens then."""


class DivergenceSection(Section):
    """What becomes of a step whose gradient is not finite or whose loss jumps; decided before the update, on all ranks.

    ``stop``: the run ends with a message. ``skip``: the update is left out; weights, optimizer and averages stay as they are
    bit for bit. ``rollback``: the run returns to the last good checkpoint and leaves the step's global batch out.
    """

    non_finite: Literal["stop", "skip", "rollback"] = free("stop")
    """What happens where a gradient is NaN or infinite. (With fp16 the loss scale is lowered and the step skipped, always.)"""
    spike: SpikeSection | None = free(None)
    """Watch the training loss for jumps. Default: off."""
    max_skips: int = Field(100, ge=1, json_schema_extra={"resume": "free"})
    """Updates skipped in a row before the run stops."""
    max_rollbacks: int = Field(3, ge=1, json_schema_extra={"resume": "free"})
    """Rollbacks in the whole life of the run before it stops."""
    learning_rate_factor: float = Field(1.0, gt=0, le=1, json_schema_extra={"resume": "free"})
    """What all learning rates are multiplied by at each rollback."""

    @property
    def rolls_back(self) -> bool:
        """Tell whether a rollback can happen."""
        return "rollback" in (self.non_finite, self.spike.policy if self.spike is not None else None)


class BestSection(Section):
    """Which checkpoints are the best."""

    metric: str
    """Name of a validation result, such as ``loss`` or ``accuracy``."""
    mode: Literal["min", "max"]
    """Whether lower or higher is better."""
    keep: int = Field(1, ge=1)
    """How many are kept."""


class CheckpointSection(Section):
    """When the state is saved, and what is kept."""

    every: Every = free(Interval(1, "epoch"))
    """How often. A run also saves when it ends or is asked to stop."""
    keep: int = Field(2, ge=1, json_schema_extra={"resume": "free"})
    """Newest checkpoints kept, besides the best."""
    best: list[BestSection] = free([])
    """Judged at each evaluation; one that is among the best is saved at once, whatever ``every`` says."""


class ResumeSection(Section):
    """Whether a run folder's state is continued."""

    mode: Literal["auto", "never", "must"] = free("auto")
    """``auto``: continue if there is a checkpoint; ``never``: refuse a folder that holds one; ``must``: refuse one without."""
    allow_changes: list[str] = free([])
    """Exact keys that may differ from the interrupted run's, such as ``optimizer.args.lr``. Each change is made from the next
    step on, or refused by name."""


_ON_OR_OFF_BY_NAME = Shorthand(
    lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value, {"type": "boolean"}
)
_MODE_ALONE = Shorthand(
    lambda value: {"mode": value} if isinstance(value, str) else value, {"enum": ["auto", "never", "must"]}
)


class RunConfiguration(Section):
    """One training run."""

    name: str | None = Field(None, pattern=r"^[^/\\\n]+$", json_schema_extra={"resume": "free"})
    """Name of the run. Default: the file's."""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """Where all randomness comes from."""
    output: str = free("runs/{name}")
    """Run folder; ``{name}`` is the run's name, and any key in braces its value: ``runs/{name}-{optimizer.args.lr}``. Relative
    to the working folder."""
    code: str | None = free(None)
    """Folder of the user's own modules, relative to the YAML file. Default: the YAML file's folder."""
    model: Annotated[ModelSection, TARGET_ALONE]
    """What is trained."""
    data: DataSection
    """What is trained on and evaluated on."""
    batch: BatchSection
    """How many samples one update sees."""
    objective: Annotated[ObjectiveSection, TARGET_ALONE]
    """What is minimised: a loss of torch by name, one of Lockstep's, or the user's own by target; or several."""
    optimizer: Annotated[OptimizerSection, TARGET_ALONE]
    """How parameters are updated."""
    schedule: Annotated[ScheduleSection, TARGET_ALONE] | None = None
    """How the learning rate changes. Default: it does not."""
    averaging: AveragingSection | None = None
    """A running average of the weights. Default: none."""
    limit: LimitSection
    """When the run is finished."""
    divergence: DivergenceSection = DivergenceSection()
    """What becomes of a step that must not be applied."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the forward and backward pass (autocast; fp16 with a loss scale). Weights keep their own type."""
    determinism: Literal["strict", "fast"] | None = free(None)
    """``strict``: deterministic algorithms only, so that a resumed run is equal bit for bit. Default: strict on a CPU,
    fast on a GPU."""
    matmul: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products on devices that offer less (TF32, bfloat16)."""
    batch_norm: Literal["local", "sync"] = "local"
    """``local``: statistics of each slot, as on one process. ``sync``: over all ranks' simultaneous slots (GPU only);
    the result then depends on the world size."""
    compile: Annotated[CompileSection | None, ON_OR_OFF] = None
    """torch.compile. Default: off."""
    strategy: StrategySection = StrategySection()
    """How the processes share the work."""
    evaluation: EvaluationSection = EvaluationSection()
    """When and how the validation data is evaluated."""
    prediction: PredictionSection = free(PredictionSection())
    """What ``lockstep predict`` predicts and writes."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When the state is saved."""
    reporting: ReportingSection = ReportingSection()
    """What is told while the run goes on."""
    resume: Annotated[ResumeSection, _MODE_ALONE] = ResumeSection()
    """Whether a run folder's state is continued; ``auto``, ``never`` and ``must`` may be written directly."""
    checks: Annotated[Literal["on", "off"], _ON_OR_OFF_BY_NAME] = free("on")
    """Whether the first start checks what the user's data, model, objective and optimizer do (``runtime/checks``), and the
    data's order once an epoch. ``off`` gives these up, not the promises of Lockstep's own code."""

    @property
    def best(self) -> list[BestSection]:
        """What checkpoints are kept for being the best by: what the configuration says, and what early stopping watches."""
        watched, best = self.limit.early_stopping, self.checkpoint.best
        if watched is None or any((b.metric, b.mode) == (watched.metric, watched.mode) for b in best):
            return best
        return [*best, BestSection(metric=watched.metric, mode=watched.mode)]

    _one_slot_each = model_validator(mode="before")(yielded_batches.one_slot_each)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        known = {"loss", *self.objective.losses, *self.evaluation.metrics}
        own = class_name(self.objective.target) != (self.objective.target or "")  # its parts show when it is called
        named = {name: own or name.partition("/")[0] in known for name in self._judged()}
        unknown = f"known results: {', '.join(sorted(known))}"
        schedule, validated = self.schedule or ScheduleSection(warmup_steps=1), self.data.has("validation")
        stopping = self.limit.early_stopping
        start = self.averaging.start if self.averaging is not None else None
        end = (self.limit.steps if start.unit == "step" else self.limit.epochs) if start is not None else None
        plateau = schedule.watches
        return refuse(
            self,
            (
                "loss" in self.evaluation.metrics,
                "evaluation.metrics.loss",
                "'loss' is the objective's own name; choose another",
            ),
            *(
                (True, f"evaluation.metrics.{name}", "a loss of the objective is called so; choose another name")
                for name in self.evaluation.metrics
                if name in self.objective.losses
            ),
            *(
                (
                    not named[best.metric],
                    f"checkpoint.best.{number}.metric",
                    f"no result is called {best.metric!r}; {unknown}",
                )
                for number, best in enumerate(self.checkpoint.best)
            ),
            *(
                (
                    any(best.metric == other.metric for other in self.best if other is not best),
                    f"checkpoint.best.{number}.metric",
                    f"{best.metric!r} is judged twice; give it one mode (limit.early_stopping's, too), and keep: n for several",
                )
                for number, best in enumerate(self.checkpoint.best)
            ),
            *self._sharding_rules(),
            *yielded_batches.rules(self.data, self.batch, self.prediction.data, micro_size=self.evaluation.micro_size),
            (
                self.checkpoint.best and not validated,
                "checkpoint.best",
                "the best checkpoint needs data.validation",
            ),
            (
                start is not None and end is not None and start.count >= end,
                "averaging.start",
                f"{start} is not before the end of the run, so nothing would be averaged",
            ),
            (
                plateau != (schedule.monitor is not None),
                "schedule.monitor",
                "'monitor' goes with ReduceLROnPlateau, and it needs one",
            ),
            (
                stopping and not validated,
                "limit.early_stopping",
                "early stopping needs data.validation",
            ),
            (
                stopping and not named[stopping.metric],
                "limit.early_stopping.metric",
                f"no result is called {stopping and stopping.metric!r}; {unknown}",
            ),
            (
                self.evaluation.class_names and not self.evaluation.metrics,
                "evaluation.class_names",
                "there are no evaluation.metrics whose classes they could name",
            ),
            (plateau and not validated, "schedule.target", "ReduceLROnPlateau needs data.validation"),
            (
                self._one_rate_for_all(),
                "schedule.args.max_lr",
                "is one rate for all groups, and would write over the rates of optimizer.groups and layer_decay: give a list, "
                "with a rate for each group in the order in which `lockstep show` lists them",
            ),
            (
                schedule.monitor is not None and not named[schedule.monitor],
                "schedule.monitor",
                f"no result is called {schedule.monitor!r}; {unknown}",
            ),
        )

    def _judged(self) -> list[str]:
        """Return the names of results that something follows from."""
        monitor = self.schedule.monitor if self.schedule is not None else None
        return [*(best.metric for best in self.best), *([monitor] if monitor is not None else [])]

    def _sharding_rules(self) -> list[tuple[Any, str, str]]:
        """What a model that the processes hold together cannot do."""
        kind, mixed = self.strategy.kind, self.strategy.fsdp.mixed_precision
        if kind == "ddp":
            return []
        targets = [self.optimizer.target, *(group.target for group in self.optimizer.groups)]
        factored = [target for target in targets if class_name(target) == "Adafactor"]
        return [
            (
                self.batch.micro_size == "auto",
                "batch.micro_size",
                f"auto tries sizes on each rank by itself, which kind: {kind} cannot; give a number",
            ),
            (
                self.compile is not None and not self.compile.blocks,
                "compile.blocks",
                f"with strategy.kind: {kind} blocks are compiled one by one: name their classes",
            ),
            (self.batch_norm == "sync", "batch_norm", f"sync goes with strategy.kind: ddp, not with {kind}"),
            (
                self.model.unfreeze,
                "model.unfreeze",
                f"with strategy.kind: {kind} what is trained is fixed at the start; use ddp, or two runs",
            ),
            (
                factored,
                "optimizer.target",
                f"Adafactor keeps sums over rows and columns, which strategy.kind: {kind} cannot cut; use AdamW, or ddp",
            ),
            (
                mixed is not None and mixed.parameters != self.precision,
                "strategy.fsdp.mixed_precision.parameters",
                f"must be that of precision ({self.precision})",
            ),
        ]

    def _one_rate_for_all(self) -> bool:
        """Tell whether the schedule would write over rates that differ between groups."""
        schedule, optimizer = self.schedule, self.optimizer
        if schedule is None or class_name(schedule.target) not in ("OneCycleLR", "CyclicLR"):
            return False
        rates = optimizer.layer_decay is not None or any("lr" in group.args for group in optimizer.groups)
        return rates and not isinstance(schedule.args.get("max_lr"), list)
