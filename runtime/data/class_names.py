"""A data set's class names, in the order of the class numbers, as torchvision, Hugging Face and others provide them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import ConcatDataset
from torch.utils.data import Subset as TorchSubset

from runtime.data.fields import Name
from runtime.data.hugging_face import ArrowRows
from runtime.data.splitting import Subset, TensorSubset


def class_names(source: Any, target: Name | Sequence[Name] | None) -> list[str] | None:
    """Return a data set's class names, or None if it has none or a user's ``target_transform`` may renumber them.

    They come from ``classes`` or ``class_to_idx`` (Lockstep's readers, torchvision's data sets, the user's own), or from a
    Hugging Face column of ``ClassLabel``.

    Args:
        target: the part or parts of a batch that are the target; for Hugging Face data sets the column.
    """
    if isinstance(source, Subset | TensorSubset | ArrowRows):
        return class_names(source.source, target)
    if isinstance(source, TorchSubset):
        return class_names(source.dataset, target)
    if isinstance(source, ConcatDataset):
        of_parts = [class_names(part, target) for part in source.datasets]
        return of_parts[0] if all(names == of_parts[0] for names in of_parts) else None
    if getattr(source, "target_transform", None) is not None:
        return None
    features = getattr(source, "features", None)
    if isinstance(features, Mapping):
        return _as_texts(_label_names(features.get("target" if target is None else target)))
    classes = getattr(source, "classes", None)
    return _as_texts(getattr(source, "class_to_idx", None) if classes is None else classes)


def _label_names(feature: Any) -> Any:
    """Return the names of a ClassLabel, or of a list of ClassLabels."""
    while feature is not None and not hasattr(feature, "names"):
        feature = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return getattr(feature, "names", None)


def _as_texts(classes: Any) -> list[str] | None:
    """Return one text per class, joining several names of one class, such as ImageNet's synonyms."""
    if isinstance(classes, Mapping):  # number to name, or name to number
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
