"""The configuration's sections on data: data sets, splits, sampling, and how a global batch is split. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from runtime.config.types import TARGET_ALONE, Component, ComponentSection, Section, Shorthand, free, refuse

SampleValues = str | int | ComponentSection
"""One value for each sample: a column of the data, the position of a tensor in a TensorDataset, an ``.npy`` file, or a
component that is called with the data set and returns an array."""


def alone(key: str) -> Shorthand:
    """Return the shorthand of a section whose one required key may be written alone."""
    return Shorthand(
        lambda value: {key: value} if isinstance(value, str | int) and not isinstance(value, bool) else value,
        {"type": ["string", "integer"]},
    )


Share = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)]


class HoldOutSection(Section):
    """Parts of ``data.train`` that are held out at random. Preprocessing is fitted on the remaining samples."""

    validation: Share | None = None
    """Share of the samples (below 1) or their number."""
    test: Share | None = None
    """Share of the samples (below 1) or their number."""
    stratify: SampleValues | None = None
    """Class of each sample; each part has the same share of every class, to within one sample."""
    group: SampleValues | None = None
    """Group of each sample; no group is in two parts."""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """Seed of the split, independent of the run's ``seed``."""
    transform: Component | None = None
    """Called on each held-out sample; ``data.train.transform`` applies to training samples only."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        shares = [share for share in (self.validation, self.test) if share is not None]
        return refuse(
            self,
            (not shares, "validation", "give 'validation', 'test' or both"),
            (sum(s for s in shares if isinstance(s, float)) >= 1, "validation", "the shares leave nothing to train on"),
            (
                self.stratify is not None and self.group is not None,
                "stratify",
                "whole groups cannot be stratified; give either 'stratify' or 'group'",
            ),
        )


class LengthGroupsSection(Section):
    """Batches of samples of similar length, to reduce padding."""

    lengths: SampleValues
    """Length of each sample."""
    stretch_batches: int = Field(50, ge=1)
    """The random order is sorted within chunks of this many batches."""


class BudgetSection(Section):
    """Global batches of at most a budget of tokens, and of at most ``batch.global_size`` samples."""

    tokens: float | int = Field(gt=0)
    """Maximum tokens (or other unit of ``lengths``) in a global batch."""
    lengths: SampleValues
    """Tokens of each sample, or its cost."""
    padded: bool = True
    """Count each sample with the length of the longest in its batch, and group similar lengths."""
    stretch_batches: int = Field(50, ge=1)
    """See ``group_by_length``."""


class BalanceSection(Section):
    """Every class drawn equally often; small classes repeat."""

    classes: SampleValues
    """Class of each sample."""
    num_samples: int | None = Field(None, ge=1)
    """Draws per epoch. Default: the number of samples."""


class SampleWeightsSection(Section):
    """Samples drawn with replacement, in proportion to a weight."""

    values: SampleValues
    """Weight of each sample, at least 0."""
    num_samples: int | None = Field(None, ge=1)
    """Draws per epoch. Default: the number of samples."""


class FieldsSection(Section):
    """Which part of a batch is what: keys of a mapping, or positions in a tuple."""

    inputs: str | int | list[str | int] | dict[str, str | int] | None = None
    """Arguments of the model: one part; several, as keyword arguments of the same names; or a mapping of argument to part.
    Default: ``inputs``, or position 0."""
    target: str | int | list[str | int] | None = None
    """The target of losses and metrics; several parts for losses that need them. Default: ``target``, or position 1."""
    weight: str | int | None = None
    """Weight of each sample, or of each element of the target; a sample of weight 2 counts twice. Default: 1."""
    id: str | int | None = free(None)
    """Id of a sample in predictions: a part of the batch, or a column of the data set. Default: the column with the name of the
    sample submission's id column, else the sample's index."""
    group: str | int | None = None
    """The query or user that a sample belongs to, for ranking metrics."""


class SplitSection(ComponentSection):
    """One part of the data: the component that builds the data set, and how its samples are processed."""

    transform: Component | None = None
    """Called on each sample under the sample's own seed; the place for random augmentation."""
    sharded_by: Literal["runtime", "dataset"] | None = None
    """Required for streams (IterableDataset), and for these only. ``runtime``: every rank and worker reads the whole stream and
    keeps its part; the result is the same for any number of them. ``dataset``: the data set shards itself; a run resumes on the
    same number of ranks and workers only."""
    yields: Literal["samples", "batches"] = "samples"
    """Streams only. ``batches``: each item is a whole batch of any number of samples, as with torch's ``batch_size=None``, and
    one slot. ``batch.global_size`` then counts such batches, and ``transform`` is called with a batch; losses, metrics and
    reports count its rows."""

    @model_validator(mode="after")
    def _streams_yield(self) -> Self:
        what = (
            "batches is for streams (IterableDataset), which also need sharded_by; for a map-style data set use "
            "data.batch_sampler or data.budget"
        )
        return refuse(self, (self.yields == "batches" and self.sharded_by is None, "yields", what))


class LoaderSection(Section):
    """torch's DataLoader. These keys change the speed, never the result. Workers always live as long as the run
    (``persistent_workers``).
    """

    num_workers: int = Field(0, ge=0, json_schema_extra={"resume": "free"})
    """Worker processes per rank; 0 loads in the training process."""
    prefetch_factor: int = Field(2, ge=1, json_schema_extra={"resume": "free"})
    """Microbatches that each worker prefetches."""
    pin_memory: bool | None = free(None)
    """Page-locked host memory, for faster copies to a GPU. Default: on if there is a GPU."""
    timeout_seconds: int = Field(0, ge=0, json_schema_extra={"resume": "free"})
    """Timeout when waiting for a worker; 0 waits indefinitely."""
    start_method: Literal["fork", "spawn", "forkserver"] | None = free(None)
    """Start method of workers. Default: Python's."""
    worker_init: Component | None = free(None)
    """``worker_init_fn``: called in each worker with its index. It cannot change a sample's seed, which is set later."""

    @model_validator(mode="after")
    def _has_workers(self) -> Self:
        return refuse(
            self,
            (self.worker_init and not self.num_workers, "worker_init", "there are no workers: num_workers is 0"),
        )


class DataSection(Section):
    """Training and evaluation data."""

    train: Annotated[SplitSection, TARGET_ALONE]
    """Training data."""
    validation: Annotated[SplitSection, TARGET_ALONE] | None = None
    """Validation data, evaluated at intervals."""
    test: Annotated[SplitSection, TARGET_ALONE] | None = None
    """Test data, evaluated once, at the end of the run."""
    split: HoldOutSection | None = None
    """Parts of ``data.train`` held out at random, in place of ``data.validation`` and ``data.test``. Default: none."""
    fields: FieldsSection = FieldsSection()
    """Which part of a batch is what."""
    shuffle: bool | None = None
    """A new keyed permutation of the training samples for each epoch (the default); off: the order of the data set."""
    sampler: Component | None = None
    """A torch Sampler over training indices, called with the data set, drawn once per epoch under the epoch's seed."""
    batch_sampler: Component | None = None
    """A torch batch sampler, called with the data set; each of its batches is one global batch."""
    group_by_length: Annotated[LengthGroupsSection, alone("lengths")] | None = None
    """Batches of samples of similar length."""
    budget: BudgetSection | None = None
    """Global batches of at most a budget of tokens."""
    balance: Annotated[BalanceSection, alone("classes")] | None = None
    """Every class drawn equally often."""
    weights: Annotated[SampleWeightsSection, alone("values")] | None = None
    """Samples drawn with replacement, in proportion to a weight."""
    drop_last: bool = False
    """Leave out each epoch's last, smaller global batch."""
    collate: Component | None = None
    """Makes a batch from a list of samples. Default: torch's ``default_collate``."""
    loader: LoaderSection = LoaderSection()
    """Options of the DataLoader."""

    @property
    def unit(self) -> str:
        """The unit of ``batch.global_size``, in the plural."""
        return "samples" if self.train.yields == "samples" else "yielded batches"

    def has(self, part: Literal["validation", "test"]) -> bool:
        """Return whether there is such data, with a section or held out."""
        held_out = self.split is not None and getattr(self.split, part) is not None
        return getattr(self, part) is not None or held_out

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        orders = ("sampler", "batch_sampler", "group_by_length", "budget", "balance", "weights")
        configured = [name for name in orders if getattr(self, name) is not None]
        ordering = [
            "the sampler" if name.endswith("sampler") else repr(name) for name in configured if name != "budget"
        ]
        batching = [name for name in configured if name in ("batch_sampler", "budget")]
        return refuse(
            self,
            (
                len(configured) > 1,
                configured[0] if configured else "",
                f"give {' or '.join(map(repr, configured))}, not {'both' if len(configured) == 2 else 'all'}",
            ),
            (
                ordering and self.shuffle is not None,
                "shuffle",
                f"{' and '.join(ordering)} decides the order; leave 'shuffle' out",
            ),
            (
                batching and self.drop_last,
                "drop_last",
                f"{' and '.join(map(repr, batching))} makes the batches; leave 'drop_last' out",
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


class BatchSection(Section):
    """Samples per update, and how they are split into microbatches."""

    global_size: int = Field(ge=1)
    """Samples per step over all ranks, independent of the number of processes; for a stream that yields whole batches, the
    number of those."""
    micro_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = free(None)
    """Maximum samples in one forward pass, limited by memory. ``auto``: the largest that fits, found by trial at the first
    start. Default: ``global_size``."""
    slots: int | None = Field(None, ge=1)
    """Microbatches K of a step over all ranks. Default: the smallest multiple of the first start's world size that
    respects ``micro_size``; kept on resumption."""

    @property
    def largest_slot(self) -> int:
        """Maximum samples in one forward pass, before ``auto`` is resolved."""
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
                "'auto' determines the slots; leave 'slots' or 'auto' out",
            ),
            (micro > self.global_size, "micro_size", f"{micro} is above batch.global_size {self.global_size}"),
            (
                self.slots and self.slots < needed,
                "slots",
                f"{self.slots} slots of at most {micro} samples hold fewer than global_size {self.global_size}; "
                f"at least {needed} are needed",
            ),
        )
