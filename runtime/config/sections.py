"""The configuration of a run: one class per section, with all defaults.

A key whose change between two starts of one run would change its result is ``exact``: resuming refuses the change, naming the
old and the new value. The others are marked ``free``. ``file.py`` reads a file into these classes. Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from runtime.config import yielded_batches
from runtime.config.data import BatchSection, DataSection, SplitSection
from runtime.config.exact_rules import exact_rules
from runtime.config.learning import AveragingSection, ModelSection, ObjectiveSection, OptimizerSection, ScheduleSection
from runtime.config.reporting import ReportingSection
from runtime.config.sharding_rules import sharding_rules
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
    """Ends a run whose validation results no longer improve.

    The checkpoint of the best evaluation is kept, regardless of ``checkpoint``. Raising ``patience`` continues the run.
    """

    metric: str = Field(json_schema_extra={"resume": "free"})
    """The monitored validation result, such as ``loss`` or ``accuracy``."""
    mode: Literal["min", "max"] = Field(json_schema_extra={"resume": "free"})
    """Whether lower or higher is better."""
    patience: int = Field(3, ge=1, json_schema_extra={"resume": "free"})
    """Evaluations in a row without an improvement."""
    min_delta: float = Field(0.0, ge=0, json_schema_extra={"resume": "free"})
    """Minimum difference to the best result that counts as an improvement."""


class LimitSection(Section):
    """The length of the run (exactly one of ``epochs`` and ``steps``), and time limits of each start."""

    epochs: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Passes over the training data."""
    steps: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Global batches."""
    time: Time | None = free(None)
    """Time limit of this start, such as ``3h55m``; the run saves early enough to stop within it, and can be resumed later."""
    early_stopping: EarlyStoppingSection | None = free(None)
    """Finish before the limit once a result no longer improves. Default: off."""
    grace_seconds: float = Field(120.0, gt=0, json_schema_extra={"resume": "free"})
    """Maximum time from a stop request until the last save is done; then the process exits without one."""
    start_seconds: float = Field(600.0, ge=1, json_schema_extra={"resume": "free"})
    """Timeout of the rendezvous of the machines of ``lockstep train --nodes``."""
    silence_seconds: float = Field(60.0, ge=1, json_schema_extra={"resume": "free"})
    """How long a rank may send no heartbeat before the others exit and name it."""
    stall_seconds: float = Field(1800.0, ge=1, json_schema_extra={"resume": "free"})
    """How long the run may make no progress (compiling takes minutes) before all ranks exit and name the one that hangs. Also
    the timeout of the ranks' rendezvous and of each collective."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        return refuse(self, ((self.epochs is None) == (self.steps is None), "", "give either 'epochs' or 'steps'"))


class EvaluationSection(Section):
    """Evaluation of the validation data."""

    every: Every = free(Interval(1, "epoch"))
    """How often."""
    micro_size: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Samples in one forward pass. Default: the largest slot of training."""
    metrics: Annotated[dict[str, Component], NAMED_BY_CLASS] = free({})
    """Mapping of names in the results to torchmetrics classes. In a list of classes, each is named after its class:
    ``MeanSquaredError`` is ``mean_squared_error``. ``task`` and ``num_classes`` are inferred from objective and model where
    possible."""
    class_names: Annotated[list[str], Field(min_length=1)] | None = free(None)
    """Names of the classes in tables, figures and predictions. Default: the names in the training data, else the class
    indices."""
    pictures: bool = free(True)
    """Plot confusion matrices and curves, if such metrics are configured, into the run folder's ``figures``."""
    metrics_on_train: bool = free(False)
    """Also compute the metrics on the training batches, at every report (in training mode, before each update)."""


class PredictionSection(Section):
    """Data and output columns of ``lockstep predict``. Nothing here changes the training."""

    data: Annotated[SplitSection, TARGET_ALONE] | None = None
    """Data to predict; it needs no target. Default: ``data.test``."""
    columns: dict[str, str] = {}
    """Mapping of column names in the file to their contents: ``id``, ``index``, ``prediction``, ``class``, ``probability``,
    ``probabilities``, ``output``, ``top_classes``, ``top_probabilities``, another key of what the objective's ``predicted``
    returns, or ``column:NAME``, a part of the data. Contents with several numbers per sample make several columns: ``{}`` in
    the name stands for the class or index; without it, the names are ``NAME_{}``. Default: id, prediction and, for classes,
    probability."""
    labels: list[str | int] = []
    """Names of the classes, in their order, written in ``prediction``. Default: evaluation.class_names, the names in the
    training data, or the class indices."""
    top_k: int | None = Field(None, ge=1)
    """Number of ``top_classes`` and ``top_probabilities``, best first."""
    sample_submission: str | None = None
    """CSV file whose columns, ids and order are kept, and whose values are replaced. Relative to the working folder. Its id
    is the column that contains ``id``. Default: the order of the data set."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        tops = [name for name, value in self.columns.items() if value in ("top_classes", "top_probabilities")]
        return refuse(
            self,
            (self.top_k and not tops, "top_k", "no column holds top_classes or top_probabilities"),
            (tops and not self.top_k, "top_k", f"is required: the number of classes in column {tops[:1]}"),
            (len({str(label) for label in self.labels}) < len(self.labels), "labels", "has a name twice"),
        )


class SpikeSection(Section):
    """Detection of loss spikes. Costs one small all-reduce and a device synchronization per step."""

    sigma: float = Field(6.0, gt=0, json_schema_extra={"resume": "free"})
    """Standard deviations above the mean of the last losses."""
    window: int = Field(100, ge=2, json_schema_extra={"resume": "free"})
    """Number of last losses for mean and standard deviation; nothing is detected before there are this many."""
    policy: Literal["stop", "skip", "rollback"] = free("stop")
    """Action on a spike."""


class DivergenceSection(Section):
    """Action on a step with a non-finite gradient or a loss spike; decided before the update, on all ranks.

    ``stop``: the run ends with a message. ``skip``: the update is skipped; weights, optimizer and averages stay unchanged bit
    for bit. ``rollback``: the run returns to the last good checkpoint and skips the step's global batch.
    """

    non_finite: Literal["stop", "skip", "rollback"] = free("stop")
    """Action on a NaN or infinite gradient. (With fp16 the loss scale is always lowered and the step skipped.)"""
    spike: SpikeSection | None = free(None)
    """Detect spikes of the training loss. Default: off."""
    max_skips: int = Field(100, ge=1, json_schema_extra={"resume": "free"})
    """Updates skipped in a row before the run stops."""
    max_rollbacks: int = Field(3, ge=1, json_schema_extra={"resume": "free"})
    """Rollbacks in the whole run, over all starts, before it stops."""
    learning_rate_factor: float = Field(1.0, gt=0, le=1, json_schema_extra={"resume": "free"})
    """Factor of all learning rates at each rollback."""

    @property
    def rolls_back(self) -> bool:
        """Whether a rollback can happen."""
        return "rollback" in (self.non_finite, self.spike.policy if self.spike is not None else None)


class BestSection(Section):
    """Best checkpoints by one validation result."""

    metric: str
    """Name of a validation result, such as ``loss`` or ``accuracy``."""
    mode: Literal["min", "max"]
    """Whether lower or higher is better."""
    keep: int = Field(1, ge=1)
    """Number of best checkpoints kept."""


class CheckpointSection(Section):
    """When checkpoints are saved, and which are kept."""

    every: Every = free(Interval(1, "epoch"))
    """How often. A run also saves when it ends or receives a stop request."""
    keep: int = Field(2, ge=1, json_schema_extra={"resume": "free"})
    """Number of newest checkpoints kept, in addition to the best."""
    best: list[BestSection] = free([])
    """Best checkpoints to keep, updated at each evaluation: a new best one is saved at once, regardless of ``every``."""


class ResumeSection(Section):
    """How a run resumes from its run folder."""

    mode: Literal["auto", "never", "must"] = free("auto")
    """``auto``: resume if there is a checkpoint; ``never``: refuse a folder with one; ``must``: refuse a folder without."""
    allow_changes: list[str] = free([])
    """Exact keys that may differ from the interrupted run's, such as ``optimizer.args.lr``. Each change applies from the next
    step on, or is refused by name."""


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
    """Seed of all randomness."""
    output: str = free("runs/{name}")
    """Run folder; ``{name}`` is the run's name, and any key in braces its value: ``runs/{name}-{optimizer.args.lr}``. Relative
    to the working folder."""
    code: str | None = free(None)
    """Folder of the user's own modules, relative to the YAML file. Default: the YAML file's folder."""
    model: Annotated[ModelSection, TARGET_ALONE]
    """The model."""
    data: DataSection
    """Training and evaluation data."""
    batch: BatchSection
    """Samples per update."""
    objective: Annotated[ObjectiveSection, TARGET_ALONE]
    """The objective to minimise: a loss of torch or of Lockstep by name, or the user's own by target; or several."""
    optimizer: Annotated[OptimizerSection, TARGET_ALONE]
    """The optimizer."""
    schedule: Annotated[ScheduleSection, TARGET_ALONE] | None = None
    """The learning rate schedule. Default: a constant rate."""
    averaging: AveragingSection | None = None
    """A running average of the weights. Default: none."""
    limit: LimitSection
    """The length of the run."""
    divergence: DivergenceSection = DivergenceSection()
    """Action on a step that must not be applied."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the forward and backward pass (autocast; fp16 with a loss scale). Weights keep their own type."""
    determinism: Literal["exact", "strict", "fast"] | None = free(None)
    """``exact``: every sum over slots has one order, so that any number of processes gives the same bits, with ``ddp`` and
    ``fsdp``. ``strict``: deterministic algorithms only, so that a run resumed on as many processes is equal bit for bit.
    Default: strict on a CPU, fast on a GPU."""
    matmul: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products on devices that support lower ones (TF32, bfloat16)."""
    batch_norm: Literal["local", "sync"] = "local"
    """``local``: statistics of each slot, as on one process. ``sync``: over all ranks' simultaneous slots (GPU only);
    the result then depends on the world size."""
    compile: Annotated[CompileSection | None, ON_OR_OFF] = None
    """torch.compile. Default: off."""
    strategy: StrategySection = StrategySection()
    """The distribution strategy."""
    evaluation: EvaluationSection = EvaluationSection()
    """Evaluation of the validation data."""
    prediction: PredictionSection = free(PredictionSection())
    """Data and output columns of ``lockstep predict``."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When checkpoints are saved."""
    reporting: ReportingSection = ReportingSection()
    """Reports during the run."""
    resume: Annotated[ResumeSection, _MODE_ALONE] = ResumeSection()
    """How a run resumes from its run folder; ``auto``, ``never`` and ``must`` may be written directly."""
    checks: Annotated[Literal["on", "off"], _ON_OR_OFF_BY_NAME] = free("on")
    """Check the user's data, model, objective and optimizer at the first start (``runtime/checks``), and the data's order once
    per epoch. ``off`` disables these checks; the guarantees of Lockstep's own code still hold."""

    @property
    def best(self) -> list[BestSection]:
        """The criteria for best checkpoints: those of ``checkpoint.best``, and that of early stopping."""
        stopping, best = self.limit.early_stopping, self.checkpoint.best
        if stopping is None or any((b.metric, b.mode) == (stopping.metric, stopping.mode) for b in best):
            return best
        return [*best, BestSection(metric=stopping.metric, mode=stopping.mode)]

    _one_slot_each = model_validator(mode="before")(yielded_batches.one_slot_each)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        known = {"loss", *self.objective.losses, *self.evaluation.metrics}
        custom = class_name(self.objective.target) != (self.objective.target or "")  # its loss names are not known yet
        named = {name: custom or name.partition("/")[0] in known for name in self._required_results()}
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
                "'loss' is reserved for the objective; choose another name",
            ),
            *(
                (True, f"evaluation.metrics.{name}", "a loss of the objective has this name; choose another name")
                for name in self.evaluation.metrics
                if name in self.objective.losses
            ),
            *(
                (
                    not named[best.metric],
                    f"checkpoint.best.{number}.metric",
                    f"there is no result {best.metric!r}; {unknown}",
                )
                for number, best in enumerate(self.checkpoint.best)
            ),
            *(
                (
                    any(best.metric == other.metric for other in self.best if other is not best),
                    f"checkpoint.best.{number}.metric",
                    f"{best.metric!r} is given twice; give it once, with the mode of limit.early_stopping if that uses it, and "
                    "keep: n for several",
                )
                for number, best in enumerate(self.checkpoint.best)
            ),
            *sharding_rules(
                self.strategy,
                batch=self.batch,
                model=self.model,
                optimizer=self.optimizer,
                compiled=self.compile,
                batch_norm=self.batch_norm,
                precision=self.precision,
            ),
            *exact_rules(self.determinism, self.strategy, self.data, batch_norm=self.batch_norm),
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
                "'monitor' is required with ReduceLROnPlateau, and for it only",
            ),
            (
                stopping and not validated,
                "limit.early_stopping",
                "early stopping needs data.validation",
            ),
            (
                stopping and not named[stopping.metric],
                "limit.early_stopping.metric",
                f"there is no result {stopping and stopping.metric!r}; {unknown}",
            ),
            (
                self.evaluation.class_names and not self.evaluation.metrics,
                "evaluation.class_names",
                "needs evaluation.metrics, whose classes it names",
            ),
            (plateau and not validated, "schedule.target", "ReduceLROnPlateau needs data.validation"),
            (
                self._one_rate_for_all(),
                "schedule.args.max_lr",
                "is one rate for all groups, and would overwrite the rates of optimizer.groups and layer_decay: give a list "
                "with a rate for each group, in the order of `lockstep show`",
            ),
            (
                schedule.monitor is not None and not named[schedule.monitor],
                "schedule.monitor",
                f"there is no result {schedule.monitor!r}; {unknown}",
            ),
        )

    def _required_results(self) -> list[str]:
        """Return the names of results that the best checkpoints, early stopping and the schedule depend on."""
        monitor = self.schedule.monitor if self.schedule is not None else None
        return [*(best.metric for best in self.best), *([monitor] if monitor is not None else [])]

    def _one_rate_for_all(self) -> bool:
        """Return whether the schedule would overwrite rates that differ between groups."""
        schedule, optimizer = self.schedule, self.optimizer
        if schedule is None or class_name(schedule.target) not in ("OneCycleLR", "CyclicLR"):
            return False
        rates = optimizer.layer_decay is not None or any("lr" in group.args for group in optimizer.groups)
        return rates and not isinstance(schedule.args.get("max_lr"), list)
