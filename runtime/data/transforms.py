"""Random augmentation, drawn under each sample's seed: equal for any number of processes and workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.errors import DataError


class Augment:
    """Randomly crop and flip an image (channels, height, width) that is part of a sample.

    Args:
        crop: height and width of the crop. Default: those of the image.
        padding: pixels of 0 added around the image before cropping, as for CIFAR.
        scale: instead crop this fraction of the area (from, to), with an aspect ratio between 3:4 and 4:3, and resize it to
            ``crop`` (Szegedy et al., "Going Deeper with Convolutions", 2015, section 6).
        flip: probability of a horizontal flip.
        part: key or position of the image in the sample. Default: ``inputs``, or position 0.
    """

    def __init__(
        self,
        *,
        crop: Sequence[int] | None = None,
        padding: int = 0,
        scale: Sequence[float] | None = None,
        flip: float = 0.0,
        part: str | int | None = None,
    ) -> None:
        if crop is not None and (len(crop) != 2 or min(crop) < 1):
            raise DataError(f"Augment: crop={list(crop)}: give [height, width]")
        if scale is not None and (crop is None or padding):
            raise DataError("Augment: 'scale' needs 'crop', the size to scale to, and no 'padding'")
        if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise DataError(f"Augment: scale={list(scale)}: give [from, to], above 0 and up to 1")
        if not 0 <= flip <= 1 or padding < 0:
            raise DataError("Augment: 'flip' must be a probability between 0 and 1, and 'padding' must not be negative")
        if crop is None and padding == 0 and flip == 0:
            raise DataError("Augment: nothing to do; give 'crop', 'padding' or 'flip'")
        self._crop, self._padding, self._scale, self._flip = crop, padding, scale, flip
        self._part = part

    def __call__(self, sample: Any) -> Any:
        """Return the sample with its image augmented."""
        part = self._part
        if part is None:
            part = "inputs" if isinstance(sample, dict) else 0
        try:
            image = sample[part]
        except (KeyError, IndexError) as error:
            raise DataError(f"Augment: the sample has no part {part!r}") from error
        if not isinstance(image, Tensor) or image.ndim != 3:
            raise DataError(f"Augment: part {part!r} must be a tensor (channels, height, width)")
        changed = self._changed(image)
        if isinstance(sample, dict):
            return {**sample, part: changed}
        return tuple(changed if place == part else value for place, value in enumerate(sample))

    def _changed(self, image: Tensor) -> Tensor:
        image = self._scaled_crop(image) if self._scale is not None else self._plain_crop(image)
        return image.flip(-1) if self._flip and float(torch.rand(())) < self._flip else image

    def _plain_crop(self, image: Tensor) -> Tensor:
        height, width = self._crop or image.shape[1:]
        if self._padding:
            image = F.pad(image, [self._padding] * 4)
        if image.shape[1] < height or image.shape[2] < width:
            raise DataError(f"Augment: an image of {tuple(image.shape[1:])} is smaller than crop {(height, width)}")
        top = int(torch.randint(image.shape[1] - height + 1, ()))
        left = int(torch.randint(image.shape[2] - width + 1, ()))
        return image[:, top : top + height, left : left + width]

    def _scaled_crop(self, image: Tensor) -> Tensor:
        assert self._scale is not None
        assert self._crop is not None
        full_height, full_width = image.shape[1:]
        low, high = self._scale
        area = full_height * full_width * (low + (high - low) * float(torch.rand(())))
        ratio = (3 / 4) * (16 / 9) ** float(torch.rand(()))  # uniform in the logarithm, from 3:4 to 4:3
        width = min(full_width, max(1, round((area * ratio) ** 0.5)))
        height = min(full_height, max(1, round((area / ratio) ** 0.5)))
        top = int(torch.randint(full_height - height + 1, ()))
        left = int(torch.randint(full_width - width + 1, ()))
        cut = image[:, top : top + height, left : left + width].unsqueeze(0)
        return F.interpolate(cut, size=list(self._crop), mode="bilinear", antialias=True).squeeze(0)
