"""The configuration's sections on what is trained and how: model, objective, optimizer, schedule, averages. No torch."""

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
    """Weights that the run starts from; a resumed run takes its checkpoint's."""

    file: str = Field(min_length=1, json_schema_extra={"resume": "free"})
    """A safetensors or torch file, or a folder with ``model.safetensors`` (a checkpoint); relative to the YAML file, or
    ``package:NAME/inside/it`` in an installed package. Weights in several files are named by their
    ``….safetensors.index.json``, or by the folder that has it. They may move between two starts of a run, but not change."""
    provided_by: str | None = Field(None, json_schema_extra={"resume": "free"})
    """The command that brings the file, for the message when it is missing."""
    entry: str | None = None
    """Where a torch file holds the state dict, such as ``state_dict`` or ``model.weights``. Default: it is one itself."""
    strip: str | None = Field(None, min_length=1)
    """What is taken off the front of the file's names, such as ``module.``."""
    prefix: str | None = Field(None, min_length=1)
    """What is then put in front of them, such as ``backbone.``."""
    ignore: list[str] = []
    """Patterns of the model's names that stay as they were built, such as those of a new head."""


class UnfreezingSection(Section):
    """What is trained from the start of an epoch on."""

    epoch: int = Field(ge=2)
    """The epoch, counted from 1."""
    match: list[str] = Field(min_length=1)
    """Patterns of frozen parameters."""


_FILE_ALONE = Shorthand(lambda value: {"file": value} if isinstance(value, str) else value, {"type": "string"})


class ModelSection(ComponentSection):
    """A torch module: built, then given weights, then frozen in parts."""

    output: str | int | None = None
    """Which part of what the model returns is its output: a key, attribute (``logits``) or position. Default: all of it."""
    weights: Annotated[WeightsSection, _FILE_ALONE] | None = None
    """Pretrained weights; a path alone stands for ``file``. Default: as the model was built."""
    freeze: list[str] = []
    """Patterns of parameters that are not trained: ``backbone.*``; a later ``!backbone.norm.*`` takes names back."""
    unfreeze: list[UnfreezingSection] = []
    """Frozen parameters that are trained from later epochs on."""
    frozen_mode: Literal["eval", "train"] = "eval"
    """Mode of modules all of whose parameters are frozen; ``eval``: BatchNorm statistics stand still, dropout is off."""
    checkpoint_activations: list[str] = free([])
    """Classes of the blocks that keep only their inputs for the backward pass, and run forward again in it."""

    @model_validator(mode="after")
    def _freezes(self) -> Self:
        nothing = "does nothing without model.freeze"
        return refuse(
            self,
            (self.unfreeze and not self.freeze, "unfreeze", nothing),
            (self.frozen_mode != "eval" and not self.freeze, "frozen_mode", nothing),
        )


class LossFieldsSection(Section):
    """Parts of the batch that one of several losses reads in place of those of ``data.fields``."""

    target: str | int | list[str | int] | None = None
    """What its output is compared with."""
    weight: str | int | None = None
    """Weight of each sample, or of each element of the target."""


class LossPartSection(ComponentSection):
    """One of several losses."""

    weight: float = Field(1.0, ge=0)
    """What its mean is multiplied by."""
    output: str | int | None = None
    """Which part of what the model returns it is given. Default: that of ``model.output``."""
    fields: LossFieldsSection = LossFieldsSection()
    """Which part of a batch is what, for this loss. Default: as ``data.fields`` says."""


class ObjectiveSection(Section):
    """What is minimised: one loss, or a weighted sum of the means of several."""

    target: str | None = Field(None, min_length=1)
    """A loss of torch or of Lockstep by name, or ``package.module:Name`` of an ``Objective``."""
    args: dict[str, Any] = {}
    """Keyword arguments, checked against the signature. ``{target, args}`` within them is a component of its own."""
    losses: dict[str, LossPartSection] = {}
    """In place of a target: several losses by the names that they are reported under. The model is called once; each
    loss is divided by what it counts itself. Metrics see the output and the target of the first."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        reserved = [name for name in self.losses if name in ("", "loss", "weight", "samples") or {"/", "."} & set(name)]
        return refuse(
            self,
            (self.target is None and not self.losses, "target", "needs a target, or several losses"),
            (self.losses and (self.target or self.args), "losses", "takes the place of 'target' and 'args'"),
            *((True, f"losses.{name}", "is not a name that a loss can be reported under") for name in reserved),
        )


class GroupSection(Section):
    """Optimizer arguments for some of the parameters."""

    match: list[str] = Field(min_length=1)
    """Patterns of parameter names, as in a shell: ``*.bias``. The first group that matches a name takes it."""
    args: dict[str, Any] = {}
    """What differs from the optimizer's own arguments, such as ``weight_decay: 0``."""
    target: str | None = Field(None, min_length=1)
    """Another optimizer for these parameters, as AdamW beside Muon; ``args`` are then all of its arguments."""


class NoDecaySection(Section):
    """Parameters without weight decay, whichever group they are in; a group's own ``weight_decay`` stands."""

    biases_and_norms: bool = True
    """Parameters of at most one dimension, and all of normalisation layers."""
    embeddings: bool = False
    """Those of embedding layers."""
    match: list[str] = []
    """Patterns of others."""


_PATTERNS_ALONE = Shorthand(
    lambda value: {"biases_and_norms": False, "match": value} if isinstance(value, list) else value,
    {"type": "array", "items": {"type": "string"}},
)


class LayerDecaySection(Section):
    """Smaller learning rates towards the input: each layer multiplies the rate of the one above by ``factor``."""

    factor: float = Field(gt=0, lt=1)
    """What the rate is multiplied by at each layer."""
    layers: list[str] = Field(min_length=1)
    """Patterns from the input to the output; ``encoder.layer.{i}.*`` stands for as many layers as there are numbers. Other
    parameters, a new head, keep the whole rate, as does the last layer where there are no others."""

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        several = next((pattern for pattern in self.layers if pattern.count("{i}") > 1), None)
        return refuse(self, (several, "layers", f"{several!r} has more than one {{i}}"))


class OptimizerSection(ComponentSection):
    """A torch optimizer by name, or the user's own by target."""

    max_grad_norm: float | None = Field(None, gt=0)
    """Scale the gradient down to this 2-norm where it is longer. Default: no clipping."""
    max_grad_value: float | None = Field(None, gt=0)
    """Clamp each element of the global batch's gradient to plus or minus this. Default: no clipping."""
    groups: list[GroupSection] = []
    """Parameters with other arguments; what no group matches gets ``args``."""
    no_decay: Annotated[Annotated[NoDecaySection | None, ON_OR_OFF], _PATTERNS_ALONE] = None
    """Parameters without weight decay; ``true``: biases and norms; a list: the patterns alone. Default: all decay."""
    layer_decay: LayerDecaySection | None = None
    """Layer-wise learning rates. Default: one rate."""

    @model_validator(mode="after")
    def _clips_once(self) -> Self:
        both = self.max_grad_norm is not None and self.max_grad_value is not None
        return refuse(self, (both, "max_grad_value", "clip by norm or by value, not both; leave one of the two out"))


class ScheduleSection(Section):
    """How the learning rate changes: a linear warm-up, then a torch scheduler by name.

    ``T_max``, ``total_steps`` and ``total_iters``, where required and left out, become the length of the run; then the limit
    can no longer change.
    """

    target: str | None = Field(None, min_length=1)
    """A class of torch.optim.lr_scheduler, ``WarmupStableDecay``, or ``package.module:Name``. Default: constant after the
    warm-up."""
    args: dict[str, Any] = {}
    """Keyword arguments of the scheduler. Functions are given by target; the ``schedulers`` of SequentialLR and
    ChainedScheduler are a list of ``{target, args}``."""
    interval: Literal["step", "epoch"] = "step"
    """What the scheduler counts: applied updates, or epochs. (ReduceLROnPlateau counts evaluations.)"""
    warmup_steps: int = Field(0, ge=0)
    """Applied updates over which the rate rises linearly to the schedule's start; the schedule begins after them."""
    monitor: str | None = None
    """ReduceLROnPlateau only: the validation result it watches, such as ``loss``; stepped after each evaluation."""

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
        """Tell whether the scheduler follows evaluations."""
        return (self.target or "").endswith("ReduceLROnPlateau")


class AnnealSection(Section):
    """How the learning rate goes to that of stochastic weight averaging (torch's SWALR)."""

    epochs: int | None = Field(None, ge=1)
    """Epochs that it takes."""
    steps: int | None = Field(None, ge=1)
    """Applied updates that it takes, in place of ``epochs``."""
    strategy: Literal["cos", "linear"] = "cos"
    """Along a cosine, or a straight line."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        return refuse(self, ((self.epochs is None) == (self.steps is None), "", "give either 'epochs' or 'steps'"))


class AveragingSection(Section):
    """A running average of the weights, kept beside them."""

    kind: Literal["ema", "swa"] = "ema"
    """``ema``: exponential moving average; ``swa``: the mean of the weights at the end of each of the last epochs."""
    decay: float | None = Field(None, gt=0, lt=1)
    """``ema``: how much of the average is kept each time. Default: 0.999."""
    warmup: bool = False
    """``ema``: keep less at first, the smaller of ``decay`` and (1 + n) / (10 + n) after n times."""
    start: Every | None = None
    """How much of the run comes before; steps are applied updates. ``swa`` needs it. Default: nothing."""
    every: Every | None = None
    """How often weights are taken in; steps are applied updates. Default: 1 step with ``ema``, 1 epoch with ``swa``."""
    learning_rate: float | None = Field(None, gt=0)
    """``swa``: what the rates of all parameter groups go to from ``start`` on, in place of the schedule's. Default: the
    schedule goes on."""
    anneal: AnnealSection | None = None
    """``swa``: how they go to ``learning_rate``. Default: over 10 epochs, along a cosine."""
    evaluate: bool = True
    """Evaluate the averaged weights, as soon as there are any, rather than the raw ones."""

    @property
    def ema_decay(self) -> float:
        """How much of an exponential average is kept."""
        return 0.999 if self.decay is None else self.decay

    @property
    def interval(self) -> Interval:
        """How often weights are taken in."""
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
            (swa and self.start is None, "start", "swa averages late weights: say from when on, such as '10 epochs'"),
            (
                swa and self.anneal and self.learning_rate is None,
                "anneal",
                "there is no 'learning_rate' to anneal to; give one, or leave 'anneal' out",
            ),
        )
