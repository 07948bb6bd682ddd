"""The configuration's sections on model, objective, optimizer, schedule and weight averaging. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from runtime.config.types import (
    ON_OR_OFF,
    ComponentSection,
    Every,
    Interval,
    Section,
    Shorthand,
    free,
    refuse,
)


class WeightsSection(Section):
    """Pretrained weights; a resumed run uses its checkpoint's."""

    file: str = Field(min_length=1, json_schema_extra={"resume": "free"})
    """A safetensors or torch file, or a folder with ``model.safetensors`` (a checkpoint); relative to the YAML file, or
    ``package:NAME/inside/it`` in an installed package. For weights in several files: their ``….safetensors.index.json``, or the
    folder that has it. The file may move between two starts of a run, but not change."""
    provided_by: str | None = Field(None, json_schema_extra={"resume": "free"})
    """The command that creates the file, for the message when it is missing."""
    entry: str | None = None
    """Key of the state dict in a torch file, such as ``state_dict`` or ``model.weights``. Default: the file is the state
    dict."""
    strip: str | None = Field(None, min_length=1)
    """Prefix removed from the file's names, such as ``module.``."""
    prefix: str | None = Field(None, min_length=1)
    """Prefix then added to them, such as ``backbone.``."""
    ignore: list[str] = []
    """Patterns of the model's names that keep their initial values, such as those of a new head."""


class UnfreezingSection(Section):
    """Parameters to unfreeze at the start of an epoch."""

    epoch: int = Field(ge=2)
    """The epoch, counted from 1."""
    match: list[str] = Field(min_length=1)
    """Patterns of frozen parameters."""


_FILE_ALONE = Shorthand(lambda value: {"file": value} if isinstance(value, str) else value, {"type": "string"})


class ModelSection(ComponentSection):
    """A torch module, with optional pretrained weights and frozen parameters."""

    output: str | int | None = None
    """The part of the model's return value used as output: a key, attribute (``logits``) or position. Default: all of it."""
    weights: Annotated[WeightsSection, _FILE_ALONE] | None = None
    """Pretrained weights; a path alone stands for ``file``. Default: the model's own initialization."""
    freeze: list[str] = []
    """Patterns of parameters that are not trained: ``backbone.*``; a later ``!backbone.norm.*`` excludes names again."""
    unfreeze: list[UnfreezingSection] = []
    """Frozen parameters that are trained from later epochs on."""
    frozen_mode: Literal["eval", "train"] = "eval"
    """Mode of modules all of whose parameters are frozen; ``eval``: BatchNorm statistics are fixed, dropout is off."""
    checkpoint_activations: list[str] = free([])
    """Activation checkpointing: classes of the blocks that keep only their inputs and recompute in the backward pass."""

    @model_validator(mode="after")
    def _freezes(self) -> Self:
        nothing = "does nothing without model.freeze"
        return refuse(
            self,
            (self.unfreeze and not self.freeze, "unfreeze", nothing),
            (self.frozen_mode != "eval" and not self.freeze, "frozen_mode", nothing),
        )


class LossFieldsSection(Section):
    """Parts of the batch for one of several losses, in place of those of ``data.fields``."""

    target: str | int | list[str | int] | None = None
    """The target of the loss."""
    weight: str | int | None = None
    """Weight of each sample, or of each element of the target."""


class LossPartSection(ComponentSection):
    """One of several losses."""

    weight: float = Field(1.0, ge=0)
    """Factor of its mean in the sum."""
    output: str | int | None = None
    """The part of the model's return value that is passed to this loss. Default: that of ``model.output``."""
    fields: LossFieldsSection = LossFieldsSection()
    """Which part of a batch is what, for this loss. Default: ``data.fields``."""


class ObjectiveSection(Section):
    """The objective: one loss, or a weighted sum of the means of several."""

    target: str | None = Field(None, min_length=1)
    """A loss of torch or of Lockstep by name, or ``package.module:Name`` of an ``Objective``."""
    args: dict[str, Any] = {}
    """Keyword arguments, checked against the signature. ``{target, args}`` within them is a nested component."""
    losses: dict[str, LossPartSection] = {}
    """In place of a target: several losses by the names that they are reported under. The model is called once; each
    loss has its own divisor. Metrics use the output and the target of the first."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        reserved = [name for name in self.losses if name in ("", "loss", "weight", "samples") or {"/", "."} & set(name)]
        return refuse(
            self,
            (self.target is None and not self.losses, "target", "needs a target, or several losses"),
            (self.losses and (self.target or self.args), "losses", "replaces 'target' and 'args'; leave these out"),
            *((True, f"losses.{name}", "is not a name that a loss can be reported under") for name in reserved),
        )


class GroupSection(Section):
    """Optimizer arguments for some of the parameters."""

    match: list[str] = Field(min_length=1)
    """Patterns of parameter names, as in a shell: ``*.bias``. The first group that matches a name takes it."""
    args: dict[str, Any] = {}
    """Arguments that differ from the optimizer's, such as ``weight_decay: 0``."""
    target: str | None = Field(None, min_length=1)
    """Another optimizer for these parameters, such as AdamW next to Muon; ``args`` are then all of its arguments."""


class NoDecaySection(Section):
    """Parameters without weight decay, in any group; a group's own ``weight_decay`` takes precedence."""

    biases_and_norms: bool = True
    """Parameters of at most one dimension, and all of normalisation layers."""
    embeddings: bool = False
    """Parameters of embedding layers."""
    match: list[str] = []
    """Patterns of other parameters."""


_PATTERNS_ALONE = Shorthand(
    lambda value: {"biases_and_norms": False, "match": value} if isinstance(value, list) else value,
    {"type": "array", "items": {"type": "string"}},
)


class LayerDecaySection(Section):
    """Smaller learning rates towards the input: each layer multiplies the rate of the one above by ``factor``."""

    factor: float = Field(gt=0, lt=1)
    """Factor of the rate per layer."""
    layers: list[str] = Field(min_length=1)
    """Patterns from the input to the output; ``encoder.layer.{i}.*`` stands for one layer per number. Other parameters, such as
    a new head, keep the whole rate; if there are none, the last layer does."""

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        several = next((pattern for pattern in self.layers if pattern.count("{i}") > 1), None)
        return refuse(self, (several, "layers", f"{several!r} has more than one {{i}}"))


class OptimizerSection(ComponentSection):
    """A torch optimizer by name, or the user's own by target."""

    max_grad_norm: float | None = Field(None, gt=0)
    """Clip the gradient to this 2-norm. Default: no clipping."""
    max_grad_value: float | None = Field(None, gt=0)
    """Clamp each element of the global batch's gradient to plus or minus this. Default: no clipping."""
    groups: list[GroupSection] = []
    """Parameter groups with other arguments; unmatched parameters get ``args``."""
    no_decay: Annotated[Annotated[NoDecaySection | None, ON_OR_OFF], _PATTERNS_ALONE] = None
    """Parameters without weight decay; ``true``: biases and norms; a list: only these patterns. Default: all decay."""
    layer_decay: LayerDecaySection | None = None
    """Layer-wise learning rate decay. Default: none."""

    @model_validator(mode="after")
    def _clips_once(self) -> Self:
        both = self.max_grad_norm is not None and self.max_grad_value is not None
        return refuse(self, (both, "max_grad_value", "clip by norm or by value, not both; leave one of the two out"))


class ScheduleSection(Section):
    """The learning rate schedule: a linear warm-up, then a torch scheduler by name.

    ``T_max``, ``total_steps`` and ``total_iters``, if required and omitted, are set to the length of the run; the limit then
    cannot change.
    """

    target: str | None = Field(None, min_length=1)
    """A class of torch.optim.lr_scheduler, ``WarmupStableDecay``, or ``package.module:Name``. Default: constant after the
    warm-up."""
    args: dict[str, Any] = {}
    """Keyword arguments of the scheduler. Functions are given by target; the ``schedulers`` of SequentialLR and
    ChainedScheduler are a list of ``{target, args}``."""
    interval: Literal["step", "epoch"] = "step"
    """When the scheduler is stepped: after each applied update, or each epoch. (ReduceLROnPlateau: after each evaluation.)"""
    warmup_steps: int = Field(0, ge=0)
    """Applied updates over which the rate rises linearly to the schedule's initial rate; the schedule starts after them."""
    monitor: str | None = None
    """ReduceLROnPlateau only: the monitored validation result, such as ``loss``."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        nothing = self.target is None and (self.args or not self.warmup_steps)
        return refuse(
            self,
            (nothing, "target", "needs a target, or warmup_steps alone"),
            (
                self.interval == "epoch" and (self.target is None or self.watches),
                "interval",
                "ReduceLROnPlateau counts evaluations, and a warm-up alone counts updates; leave 'interval' out",
            ),
        )

    @property
    def watches(self) -> bool:
        """Whether the scheduler monitors evaluations."""
        return (self.target or "").endswith("ReduceLROnPlateau")


class AnnealSection(Section):
    """Annealing of the learning rate to that of stochastic weight averaging (torch's SWALR)."""

    epochs: int | None = Field(None, ge=1)
    """Length in epochs."""
    steps: int | None = Field(None, ge=1)
    """Length in applied updates, in place of ``epochs``."""
    strategy: Literal["cos", "linear"] = "cos"
    """Cosine or linear annealing."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        return refuse(self, ((self.epochs is None) == (self.steps is None), "", "give either 'epochs' or 'steps'"))


class AveragingSection(Section):
    """A running average of the weights, in addition to the raw ones."""

    kind: Literal["ema", "swa"] = "ema"
    """``ema``: exponential moving average; ``swa``: the mean of the weights at the end of each of the last epochs."""
    decay: float | None = Field(None, gt=0, lt=1)
    """``ema``: decay of the average per averaging step. Default: 0.999."""
    warmup: bool = False
    """``ema``: smaller decay at first, the minimum of ``decay`` and (1 + n) / (10 + n) after n averaging steps."""
    start: Every | None = None
    """When averaging starts; steps are applied updates. Required with ``swa``. Default: at once."""
    every: Every | None = None
    """Averaging interval; steps are applied updates. Default: 1 step with ``ema``, 1 epoch with ``swa``."""
    learning_rate: float | None = Field(None, gt=0)
    """``swa``: learning rate of all parameter groups from ``start`` on, in place of the schedule's. Default: the schedule
    continues."""
    anneal: AnnealSection | None = None
    """``swa``: annealing to ``learning_rate``. Default: over 10 epochs, along a cosine."""
    evaluate: bool = True
    """Evaluate the averaged weights, as soon as there are any, rather than the raw ones."""

    @property
    def ema_decay(self) -> float:
        """The decay of an exponential average."""
        return 0.999 if self.decay is None else self.decay

    @property
    def interval(self) -> Interval:
        """The averaging interval."""
        return self.every or Interval(1, "epoch" if self.kind == "swa" else "step")

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        swa = self.kind == "swa"
        return refuse(
            self,
            *(
                (swa and value, key, f"'{key}' belongs to kind: ema")
                for key, value in (("decay", self.decay), ("warmup", self.warmup))
            ),
            *(
                (not swa and value, key, f"'{key}' belongs to kind: swa")
                for key, value in (("learning_rate", self.learning_rate), ("anneal", self.anneal))
            ),
            (
                swa and self.start is None,
                "start",
                "swa averages late weights: set when averaging starts, such as '10 epochs'",
            ),
            (
                swa and self.anneal and self.learning_rate is None,
                "anneal",
                "there is no 'learning_rate' to anneal to; give one, or leave 'anneal' out",
            ),
        )
