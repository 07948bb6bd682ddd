"""The names of a data set's classes, in the order of their numbers, as torchvision, Hugging Face and others give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import ConcatDataset
from torch.utils.data import Subset as TorchSubset

from runtime.data.fields import Name
from runtime.data.hugging_face import ArrowRows
from runtime.data.splitting import Subset, TensorSubset


def class_names(source: Any, target: Name | Sequence[Name] | None) -> list[str] | None:
    """Return what a data set calls its classes, or None if it does not say, or a function of the user's renumbers them.

    That is its ``classes`` or ``class_to_idx`` (Lockstep's readers, torchvision's data sets, the user's own), or the names of a
    Hugging Face column of ``ClassLabel``.

    Args:
        target: part of a batch, or several, that the target is; the column for Hugging Face's data sets.
    """
    if isinstance(source, Subset | TensorSubset | ArrowRows):
        return class_names(source.source, target)
    if isinstance(source, TorchSubset):
        return class_names(source.dataset, target)
    if isinstance(source, ConcatDataset):
        found = [class_names(part, target) for part in source.datasets]
        return found[0] if all(names == found[0] for names in found) else None
    if getattr(source, "target_transform", None) is not None:
        return None
    features = getattr(source, "features", None)
    if isinstance(features, Mapping):
        return _named(_of_feature(features.get("target" if target is None else target)))
    classes = getattr(source, "classes", None)
    return _named(getattr(source, "class_to_idx", None) if classes is None else classes)


def _of_feature(feature: Any) -> Any:
    """Return the names of a ClassLabel, or of a list of them."""
    while feature is not None and not hasattr(feature, "names"):
        feature = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return getattr(feature, "names", None)


def _named(classes: Any) -> list[str] | None:
    """Return names as texts: of several for one class, as ImageNet's synonyms, all of them."""
    if isinstance(classes, Mapping):  # a number's name, or a name's number
        by_number = (
            classes if all(isinstance(key, int) for key in classes) else {n: name for name, n in classes.items()}
        )
        classes = [by_number.get(number) for number in range(len(classes))]
    elif hasattr(classes, "tolist"):  # an array, such as those of scikit-learn's encoders
        classes = classes.tolist()
    if not isinstance(classes, list | tuple) or not classes or None in classes:
        return None
    names = [", ".join(map(str, name)) if isinstance(name, list | tuple) else str(name) for name in classes]
    return names if len(set(names)) == len(names) else None
