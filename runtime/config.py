"""The configuration of a run: one class per section; defaults live here and nowhere else.

A key whose change between two starts of one run would change its result is ``exact``: resuming refuses it, naming the old
and the new value. The others are marked ``free``. Reading a file into these classes is ``config_file.py``. Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from runtime.config_data import Balance, Budget, HoldOut, LengthGroups, SampleWeights, alone
from runtime.config_types import (
    TARGET_ALONE,
    Component,
    ComponentSection,
    Every,
    Interval,
    Section,
    Shorthand,
    Time,
    free,
    refuse,
)

_ON_OR_OFF = Shorthand(lambda value: {} if value is True else None if value is False else value, {"type": "boolean"})


class Weights(Section):
    """Weights that the run starts from; a resumed run takes its checkpoint's."""

    file: str = Field(min_length=1, json_schema_extra={"resume": "free"})
    """A safetensors or torch file, or a folder with ``model.safetensors`` (a checkpoint); relative to the YAML file. The file
    may move between two starts of a run, but not change."""
    entry: str | None = None
    """Where a torch file holds the state dict, such as ``state_dict`` or ``model.weights``. Default: it is one itself."""
    strip: str | None = Field(None, min_length=1)
    """What is taken off the front of the file's names, such as ``module.``."""
    prefix: str | None = Field(None, min_length=1)
    """What is then put in front of them, such as ``backbone.``."""
    ignore: list[str] = []
    """Patterns of the model's names that stay as they were built, such as those of a new head."""


class Unfreezing(Section):
    """What is trained from the start of an epoch on."""

    epoch: int = Field(ge=2)
    """The epoch, counted from 1."""
    match: list[str] = Field(min_length=1)
    """Patterns of frozen parameters."""


_FILE_ALONE = Shorthand(lambda value: {"file": value} if isinstance(value, str) else value, {"type": "string"})


class Model(ComponentSection):
    """A torch module: built, then given weights, then frozen in parts."""

    output: str | int | None = None
    """Which part of what the model returns is its output: a key, attribute (``logits``) or position. Default: all of it."""
    weights: Annotated[Weights, _FILE_ALONE] | None = None
    """Pretrained weights; a path alone stands for ``file``. Default: as the model was built."""
    freeze: list[str] = []
    """Patterns of parameters that are not trained: ``backbone.*``; a later ``!backbone.norm.*`` takes names back."""
    unfreeze: list[Unfreezing] = []
    """Frozen parameters that are trained from later epochs on."""
    frozen_mode: Literal["eval", "train"] = "eval"
    """Mode of modules all of whose parameters are frozen; ``eval``: BatchNorm statistics stand still, dropout is off."""

    @model_validator(mode="after")
    def _freezes(self) -> Self:
        nothing = "does nothing without model.freeze"
        return refuse(
            self,
            (self.unfreeze and not self.freeze, "unfreeze", nothing),
            (self.frozen_mode != "eval" and not self.freeze, "frozen_mode", nothing),
        )


class Fields(Section):
    """Which part of a batch is what: keys of a mapping, or positions in a tuple."""

    inputs: str | int | list[str | int] | dict[str, str | int] | None = None
    """What the model is called with: one part; several, as keyword arguments of their names; or argument to part.
    Default: ``inputs``, or position 0."""
    target: str | int | list[str | int] | None = None
    """What the output is compared with; several parts for losses that need them. Default: ``target``, or position 1."""
    weight: str | int | None = None
    """Weight of each sample, or of each element of the target; a sample of weight 2 counts twice. Default: 1."""
    id: str | int | None = None
    """What a sample is called in predictions. Default: its index."""
    group: str | int | None = None
    """The query or user that a sample belongs to, for ranking metrics."""


class LossFields(Section):
    """Parts of the batch that one of several losses reads in place of those of ``data.fields``."""

    target: str | int | list[str | int] | None = None
    """What its output is compared with."""
    weight: str | int | None = None
    """Weight of each sample, or of each element of the target."""


class LossPart(ComponentSection):
    """One of several losses."""

    weight: float = Field(1.0, ge=0)
    """What its mean is multiplied by."""
    output: str | int | None = None
    """Which part of what the model returns it is given. Default: that of ``model.output``."""
    fields: LossFields = LossFields()
    """Which part of a batch is what, for this loss. Default: as ``data.fields`` says."""


class Objective(Section):
    """What is minimised: one loss, or a weighted sum of the means of several."""

    target: str | None = Field(None, min_length=1)
    """A loss of torch or of Lockstep by name, or ``package.module:Name`` of an ``Objective``."""
    args: dict[str, Any] = {}
    """Keyword arguments, checked against the signature. ``{target, args}`` within them is a component of its own."""
    losses: dict[str, LossPart] = {}
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


class Split(ComponentSection):
    """One part of the data: what makes the data set, and what happens to its samples."""

    transform: Component | None = None
    """Called on each sample under the sample's own seed; where randomness belongs if the data set is deterministic."""
    sharded_by: Literal["runtime", "dataset"] | None = None
    """Streams (IterableDataset) only, and there required. ``runtime``: every rank and worker reads all and keeps its part;
    the answer is the same for any number of them. ``dataset``: the data set gives each of them its own share; resumed
    on the same number only."""


class Loader(Section):
    """torch's DataLoader. Nothing here changes the result, only the speed. Workers always live as long as the run
    (``persistent_workers``).
    """

    num_workers: int = Field(0, ge=0, json_schema_extra={"resume": "free"})
    """Worker processes per rank; 0 loads in the training process."""
    prefetch_factor: int = Field(2, ge=1, json_schema_extra={"resume": "free"})
    """Microbatches each worker keeps ready."""
    pin_memory: bool | None = free(None)
    """Page-locked host memory, for faster copies to a GPU. Default: on where there is a GPU."""
    timeout_seconds: int = Field(0, ge=0, json_schema_extra={"resume": "free"})
    """Longest wait for a worker; 0 waits for ever."""
    start_method: Literal["fork", "spawn", "forkserver"] | None = free(None)
    """How workers are started. Default: Python's."""
    worker_init: Component | None = free(None)
    """``worker_init_fn``: called in each worker with its number. It cannot change a sample's seed, which is set later."""

    @model_validator(mode="after")
    def _has_workers(self) -> Self:
        return refuse(
            self,
            (self.worker_init and not self.num_workers, "worker_init", "there are no workers: num_workers is 0"),
        )


class Data(Section):
    """Which data is trained on and evaluated on."""

    train: Annotated[Split, TARGET_ALONE]
    """What is trained on."""
    validation: Annotated[Split, TARGET_ALONE] | None = None
    """What is evaluated at intervals."""
    test: Annotated[Split, TARGET_ALONE] | None = None
    """What is evaluated once, at the end of the run."""
    split: HoldOut | None = None
    """Parts of ``data.train`` held out at random, in place of ``data.validation`` and ``data.test``. Default: none."""
    fields: Fields = Fields()
    """Which part of a batch is what."""
    shuffle: bool | None = None
    """A new keyed permutation of the training samples for each epoch (the default); off: their own order."""
    sampler: Component | None = None
    """A torch Sampler over training indices, called with the data set, drawn once per epoch under the epoch's seed."""
    batch_sampler: Component | None = None
    """A torch batch sampler, called with the data set; each of its batches is one global batch."""
    group_by_length: Annotated[LengthGroups, alone("lengths")] | None = None
    """Batches of samples of similar length."""
    budget: Budget | None = None
    """Global batches of as many samples as a budget of tokens allows."""
    balance: Annotated[Balance, alone("classes")] | None = None
    """Every class drawn equally often."""
    weights: Annotated[SampleWeights, alone("values")] | None = None
    """Samples drawn with replacement, in proportion to a weight."""
    drop_last: bool = False
    """Leave out each epoch's last, smaller global batch."""
    collate: Component | None = None
    """Makes a batch from a list of samples. Default: torch's ``default_collate``."""
    loader: Loader = Loader()
    """How samples are read."""

    def has(self, part: Literal["validation", "test"]) -> bool:
        """Tell whether there is such data, of its own or held out."""
        held_out = self.split is not None and getattr(self.split, part) is not None
        return getattr(self, part) is not None or held_out

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        orders = ("sampler", "batch_sampler", "group_by_length", "budget", "balance", "weights")
        given = [name for name in orders if getattr(self, name) is not None]
        decides = ["the sampler" if name.endswith("sampler") else repr(name) for name in given if name != "budget"]
        own_batches = [name for name in given if name in ("batch_sampler", "budget")]
        return refuse(
            self,
            (
                len(given) > 1,
                given[0] if given else "",
                f"give {' or '.join(map(repr, given))}, not {'both' if len(given) == 2 else 'all'}",
            ),
            (
                decides and self.shuffle is not None,
                "shuffle",
                f"{' and '.join(decides)} decides the order; leave 'shuffle' out",
            ),
            (
                own_batches and self.drop_last,
                "drop_last",
                f"{' and '.join(map(repr, own_batches))} makes the batches; leave 'drop_last' out",
            ),
            *(
                (
                    self.split is not None
                    and getattr(self.split, part) is not None
                    and getattr(self, part) is not None,
                    part,
                    f"data.split holds out data for {part}; give one of the two",
                )
                for part in ("validation", "test")
            ),
        )


class Batch(Section):
    """How many samples one update sees, and how they are cut up."""

    global_size: int = Field(ge=1)
    """Samples of one step, over all ranks. More processes never change it."""
    micro_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = free(None)
    """Most samples in one forward pass; what fits in memory. ``auto``: found by trying at the first start. Default:
    ``global_size``."""
    slots: int | None = Field(None, ge=1)
    """Microbatches K of a step over all ranks. Default: the smallest multiple of the first start's world size that
    respects ``micro_size``; kept on resumption."""

    @property
    def largest_slot(self) -> int:
        """Most samples in one forward pass, as far as it is known before trying."""
        return self.micro_size if isinstance(self.micro_size, int) else self.global_size

    @model_validator(mode="after")
    def _slots_fit(self) -> Self:
        micro = self.largest_slot
        needed = -(-self.global_size // micro)
        return refuse(
            self,
            (
                self.slots and self.micro_size == "auto",
                "micro_size",
                "'auto' finds the slots by itself; leave 'slots' or 'auto' out",
            ),
            (micro > self.global_size, "micro_size", f"{micro} is above batch.global_size {self.global_size}"),
            (
                self.slots and self.slots < needed,
                "slots",
                f"{self.slots} slots of at most {micro} samples hold fewer than global_size {self.global_size}; "
                f"at least {needed} are needed",
            ),
        )


class Group(Section):
    """Optimizer arguments for some of the parameters."""

    match: list[str] = Field(min_length=1)
    """Patterns of parameter names, as in a shell: ``*.bias``. The first group that matches a name takes it."""
    args: dict[str, Any] = {}
    """What differs from the optimizer's own arguments, such as ``weight_decay: 0``."""
    target: str | None = Field(None, min_length=1)
    """Another optimizer for these parameters, as AdamW beside Muon; ``args`` are then all of its arguments."""


class NoDecay(Section):
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


class LayerDecay(Section):
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


class Optimizer(ComponentSection):
    """A torch optimizer by name, or the user's own by target."""

    max_grad_norm: float | None = Field(None, gt=0)
    """Scale the gradient down to this 2-norm where it is longer. Default: no clipping."""
    max_grad_value: float | None = Field(None, gt=0)
    """Clamp each element of the global batch's gradient to plus or minus this. Default: no clipping."""
    groups: list[Group] = []
    """Parameters with other arguments; what no group matches gets ``args``."""
    no_decay: Annotated[Annotated[NoDecay | None, _ON_OR_OFF], _PATTERNS_ALONE] = None
    """Parameters without weight decay; ``true``: biases and norms; a list: the patterns alone. Default: all decay."""
    layer_decay: LayerDecay | None = None
    """Layer-wise learning rates. Default: one rate."""

    @model_validator(mode="after")
    def _clips_once(self) -> Self:
        both = self.max_grad_norm is not None and self.max_grad_value is not None
        return refuse(self, (both, "max_grad_value", "clip by norm or by value, not both; leave one of the two out"))


class Schedule(Section):
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


class Anneal(Section):
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


class Averaging(Section):
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
    anneal: Anneal | None = None
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


class EarlyStopping(Section):
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


class Limit(Section):
    """When the run is finished (exactly one of ``epochs`` and ``steps``), and how long one start of it may take."""

    epochs: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Passes over the training data."""
    steps: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Global batches."""
    time: Time | None = free(None)
    """Time this start may take, such as ``3h55m``; the run then saves, early enough to be done by then, and can go on later."""
    early_stopping: EarlyStopping | None = free(None)
    """Finish before the limit once a result no longer improves. Default: off."""
    grace_seconds: float = Field(120.0, gt=0, json_schema_extra={"resume": "free"})
    """Longest time from being asked to stop until the last save is done; then the process leaves without one."""
    silence_seconds: float = Field(60.0, ge=1, json_schema_extra={"resume": "free"})
    """How long a rank may give no sign of life before the others leave and name it."""
    stall_seconds: float = Field(1800.0, ge=1, json_schema_extra={"resume": "free"})
    """How long the run may stand still (compiling takes minutes) before all leave, naming the rank that hangs."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        return refuse(self, ((self.epochs is None) == (self.steps is None), "", "give either 'epochs' or 'steps'"))


class Compile(Section):
    """torch.compile of the model. Off unless this section is there; ``compile: true`` takes the defaults."""

    backend: str = "inductor"
    """Compiler backend."""
    mode: str | None = None
    """Preset of the backend, such as ``max-autotune``."""
    dynamic: bool | None = None
    """Compile for varying shapes. Default: torch decides."""
    fullgraph: bool = False
    """Refuse graph breaks."""


class DistributedDataParallel(Section):
    """Options of torch's DistributedDataParallel."""

    bucket_mb: float = Field(25.0, gt=0)
    """Size of the gradient buckets, in MiB."""
    static_graph: bool = free(False)
    """The graph is the same at every step; lets DDP reorder and allows re-entrant checkpointing."""
    find_unused_parameters: bool = free(False)
    """Search each forward pass for parameters without a gradient."""
    gradient_as_bucket_view: bool = free(True)
    """Gradients live inside the buckets: less memory, one copy fewer."""
    communication_hook: Literal["fp16", "bf16"] | None = None
    """Send gradients in half precision. Inexact: the sum is rounded."""

    @model_validator(mode="after")
    def _static_or_searched(self) -> Self:
        both = self.static_graph and self.find_unused_parameters
        return refuse(
            self, (both, "find_unused_parameters", "a static graph needs no search; leave one of the two out")
        )


class Strategy(Section):
    """How the processes share the work."""

    kind: Literal["ddp"] = free("ddp")
    """``ddp``: every process holds the whole model (also with one process)."""
    world_size: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Processes that must be training; any other number is refused. Default: what the launcher asked for."""
    ddp: DistributedDataParallel = DistributedDataParallel()
    """Options of DistributedDataParallel."""


class Evaluation(Section):
    """When and how the validation data is evaluated."""

    every: Every = free(Interval(1, "epoch"))
    """How often."""
    micro_size: int | None = Field(None, ge=1, json_schema_extra={"resume": "free"})
    """Samples in one forward pass. Default: the largest slot of training."""
    metrics: dict[str, Component] = free({})
    """Name in the results to torchmetrics class."""
    class_names: Annotated[list[str], Field(min_length=1)] | None = free(None)
    """What tables and pictures call the classes. Default: their numbers."""
    pictures: bool = free(True)
    """Draw confusion matrices and curves, where such metrics are asked for, into the run folder's ``figures``."""
    metrics_on_train: bool = free(False)
    """Also compute the metrics on the training batches, at every report (in training mode, before each update)."""


class Prediction(Section):
    """What ``lockstep predict`` predicts, and what it writes. Nothing here changes the training."""

    data: Annotated[Split, TARGET_ALONE] | None = None
    """What is predicted; it needs no target. Default: ``data.test``."""
    columns: dict[str, str] = {}
    """Name in the file to what it holds: ``id``, ``index``, ``prediction``, ``class``, ``probability``, ``probabilities``,
    ``output``, ``top_classes``, ``top_probabilities``, or what the objective's ``predictions`` gives besides. Several numbers
    a sample make several columns: ``{}`` in the name stands for the class or number, ``NAME_{}`` where it is left out.
    Default: id, prediction and, for classes, probability."""
    labels: list[str | int] = []
    """Names of the classes, in their order; ``prediction`` then writes names. Default: the class's number."""
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


class Spike(Section):
    """When a step's loss counts as a jump. Watching costs one small all-reduce and a wait for the device at each step."""

    sigma: float = Field(6.0, gt=0, json_schema_extra={"resume": "free"})
    """Standard deviations above the mean of the last losses."""
    window: int = Field(100, ge=2, json_schema_extra={"resume": "free"})
    """How many losses mean and standard deviation are taken of; nothing is judged before there are as many."""
    policy: Literal["stop", "skip", "rollback"] = free("stop")
    """What happens then."""


class Divergence(Section):
    """What becomes of a step whose gradient is not finite or whose loss jumps; decided before the update, on all ranks.

    ``stop``: the run ends with a message. ``skip``: the update is left out; weights, optimizer and averages stay as they are
    bit for bit. ``rollback``: the run returns to the last good checkpoint and leaves the step's global batch out.
    """

    non_finite: Literal["stop", "skip", "rollback"] = free("stop")
    """What happens where a gradient is NaN or infinite. (With fp16 the loss scale is lowered and the step skipped, always.)"""
    spike: Spike | None = free(None)
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


class Best(Section):
    """Which checkpoints are the best."""

    metric: str
    """Name of a validation result, such as ``loss`` or ``accuracy``."""
    mode: Literal["min", "max"]
    """Whether lower or higher is better."""
    keep: int = Field(1, ge=1)
    """How many are kept."""


class Checkpoint(Section):
    """When the state is saved, and what is kept."""

    every: Every = free(Interval(1, "epoch"))
    """How often. A run also saves when it ends or is asked to stop."""
    keep: int = Field(2, ge=1, json_schema_extra={"resume": "free"})
    """Newest checkpoints kept, besides the best."""
    best: list[Best] = free([])
    """Judged at each evaluation; one that is among the best is saved at once, whatever ``every`` says."""


class WeightsAndBiases(Section):
    """Weights & Biases, written by rank 0 alone."""

    mode: Literal["online", "offline", "disabled"] | None = free(None)
    """Default: online where an API key is found, otherwise offline."""
    project: str = free("lockstep")
    """Project the run belongs to."""
    entity: str | None = free(None)
    """User or team. Default: that of the API key."""
    tags: list[str] = free([])
    """Labels of the run."""


class Reporting(Section):
    """What is told while the run goes on."""

    every: Every = free(Interval(50, "step"))
    """How often the training loss is read from the device and reported."""
    progress: bool = free(True)
    """A progress bar where the output is a terminal, plain lines elsewhere."""
    wandb: Annotated[WeightsAndBiases | None, _ON_OR_OFF] = free(None)
    """Weights & Biases; ``true`` takes the defaults. Default: off."""


class Resume(Section):
    """Whether a run folder's state is continued."""

    mode: Literal["auto", "never", "must"] = free("auto")
    """``auto``: continue if there is a checkpoint; ``never``: refuse a folder that holds one; ``must``: refuse one without."""
    allow_changes: list[str] = free([])
    """Exact keys that may differ from the interrupted run's, such as ``optimizer.args.lr``."""


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
    """Run folder; ``{name}`` is the run's name. Relative to the working folder."""
    code: str | None = free(None)
    """Folder of the user's own modules, relative to the YAML file. Default: the YAML file's folder."""
    model: Annotated[Model, TARGET_ALONE]
    """What is trained."""
    data: Data
    """What is trained on and evaluated on."""
    batch: Batch
    """How many samples one update sees."""
    objective: Annotated[Objective, TARGET_ALONE]
    """What is minimised: a loss of torch by name, one of Lockstep's, or the user's own by target; or several."""
    optimizer: Optimizer
    """How parameters are updated."""
    schedule: Annotated[Schedule, TARGET_ALONE] | None = None
    """How the learning rate changes. Default: it does not."""
    averaging: Averaging | None = None
    """A running average of the weights. Default: none."""
    limit: Limit
    """When the run is finished."""
    divergence: Divergence = Divergence()
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
    compile: Annotated[Compile | None, _ON_OR_OFF] = None
    """torch.compile. Default: off."""
    strategy: Strategy = Strategy()
    """How the processes share the work."""
    evaluation: Evaluation = Evaluation()
    """When and how the validation data is evaluated."""
    prediction: Prediction = free(Prediction())
    """What ``lockstep predict`` predicts and writes."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved."""
    reporting: Reporting = Reporting()
    """What is told while the run goes on."""
    resume: Annotated[Resume, _MODE_ALONE] = Resume()
    """Whether a run folder's state is continued; ``auto``, ``never`` and ``must`` may be written directly."""

    @property
    def best(self) -> list[Best]:
        """What checkpoints are kept for being the best by: what the configuration says, and what early stopping watches."""
        watched, best = self.limit.early_stopping, self.checkpoint.best
        if watched is None or any((b.metric, b.mode) == (watched.metric, watched.mode) for b in best):
            return best
        return [*best, Best(metric=watched.metric, mode=watched.mode)]

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        known = {"loss", *self.objective.losses, *self.evaluation.metrics}
        unknown = f"known results: {', '.join(sorted(known))}"
        schedule, validated = self.schedule or Schedule(warmup_steps=1), self.data.has("validation")
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
                    best.metric not in known,
                    f"checkpoint.best.{number}.metric",
                    f"no result is called {best.metric!r}; {unknown}",
                )
                for number, best in enumerate(self.checkpoint.best)
            ),
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
                stopping
                and ":" not in (self.objective.target or "")
                and stopping.metric.partition("/")[0] not in known,
                "limit.early_stopping.metric",  # the parts of a user's objective are known at the first evaluation only
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
                schedule.monitor not in (None, *known),
                "schedule.monitor",
                f"no result is called {schedule.monitor!r}; {unknown}",
            ),
        )

    def _one_rate_for_all(self) -> bool:
        """Tell whether the schedule would write over rates that differ between groups."""
        schedule, optimizer = self.schedule, self.optimizer
        if schedule is None or (schedule.target or "").rpartition(":")[2] not in ("OneCycleLR", "CyclicLR"):
            return False
        rates = optimizer.layer_decay is not None or any("lr" in group.args for group in optimizer.groups)
        return rates and not isinstance(schedule.args.get("max_lr"), list)
