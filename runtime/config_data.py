"""The configuration's sections on how data is held out and drawn, apart from samplers. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from runtime.config_types import Component, ComponentSection, Section, Shorthand, refuse

SampleValues = str | int | ComponentSection
"""One value for each sample: a column of the data, the position of a tensor in a TensorDataset, an ``.npy`` file, or a
component that is called with the data set and returns an array."""


def alone(key: str) -> Shorthand:
    """Let a section's one needed key be written alone."""
    return Shorthand(
        lambda value: {key: value} if isinstance(value, str | int) and not isinstance(value, bool) else value,
        {"type": ["string", "integer"]},
    )


Share = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)]


class HoldOut(Section):
    """Parts of ``data.train`` that are held out at random. What the data is prepared by is fitted on what remains."""

    validation: Share | None = None
    """Share of the samples (below 1) or their number."""
    test: Share | None = None
    """Share of the samples (below 1) or their number."""
    stratify: SampleValues | None = None
    """Class of each sample; each part has every class in its share, to within one sample."""
    group: SampleValues | None = None
    """Group of each sample; no group is in two parts."""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """Another seed, another split. The run's own ``seed`` does not change it."""
    transform: Component | None = None
    """Called on each held-out sample; ``data.train.transform`` is for training samples alone."""

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
                "whole groups cannot have every class in its share; give 'stratify' or 'group'",
            ),
        )


class LengthGroups(Section):
    """Batches of samples of similar length, so that little is padded."""

    lengths: SampleValues
    """Length of each sample."""
    stretch_batches: int = Field(50, ge=1)
    """Samples are sorted within stretches of this many batches of a random order."""


class Budget(Section):
    """Global batches of as many samples as a budget allows; none is above it, nor above ``batch.global_size`` samples."""

    tokens: float | int = Field(gt=0)
    """Most tokens (or whatever ``lengths`` counts) in a global batch."""
    lengths: SampleValues
    """Tokens of each sample, or its cost."""
    padded: bool = True
    """Count each sample as long as the longest of its batch, and put similar lengths together."""
    stretch_batches: int = Field(50, ge=1)
    """See ``group_by_length``."""


class Balance(Section):
    """Every class drawn equally often; small classes repeat."""

    classes: SampleValues
    """Class of each sample."""
    num_samples: int | None = Field(None, ge=1)
    """Draws of an epoch. Default: as many as there are samples."""


class SampleWeights(Section):
    """Samples drawn with replacement, in proportion to a weight."""

    values: SampleValues
    """Weight of each sample, not below 0."""
    num_samples: int | None = Field(None, ge=1)
    """Draws of an epoch. Default: as many as there are samples."""
