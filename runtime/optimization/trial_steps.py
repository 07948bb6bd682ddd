"""Trial steps of optimizers, which do not trigger the hooks that users registered for all optimizers."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer


def trial_copy(optimizer: Optimizer, group: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Return a copy of an optimizer with the same class and attributes, other parameters and no state."""
    copy: Any = object.__new__(type(optimizer))
    copy.__dict__.update(optimizer.__dict__)
    copy._optimizer_step_pre_hooks, copy._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    copy.state = defaultdict(dict)
    copy.param_groups = [{**group, "params": list(parameters)}]
    optimizer_copy: Optimizer = copy
    return optimizer_copy


def trial_step(optimizer: Optimizer) -> None:
    """Step an optimizer without the user's global hooks."""
    hooks: tuple[dict[int, Any], ...] = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    saved = [dict(each) for each in hooks]
    try:
        for each in hooks:
            each.clear()  # in place: the handles that remove hooks refer to the dictionary
        # The instance may have a step attribute set by a scheduler, bound to the original optimizer.
        type(optimizer).step(optimizer)
    finally:
        for each, before in zip(hooks, saved, strict=True):
            each.update(before)
