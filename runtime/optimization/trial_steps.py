"""Steps of optimizers that are only tried out: hooks that users registered for all optimizers do not see them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer


def trial_copy(optimizer: Optimizer, group: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Return an optimizer like another, of the same class and attributes, for other parameters and without a state."""
    copy: Any = object.__new__(type(optimizer))
    copy.__dict__.update(optimizer.__dict__)
    copy._optimizer_step_pre_hooks, copy._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    copy.state = defaultdict(dict)
    copy.param_groups = [{**group, "params": list(parameters)}]
    made: Optimizer = copy
    return made


def trial_step(optimizer: Optimizer) -> None:
    """Step an optimizer that is only tried out: hooks of the user's for all optimizers have no part in it."""
    hooks: tuple[dict[int, Any], ...] = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    kept = [dict(each) for each in hooks]
    try:
        for each in hooks:
            each.clear()  # in place: the handles that remove them know the dictionary
        # The instance may bear one that a schedule has put there, bound to the original.
        type(optimizer).step(optimizer)
    finally:
        for each, before in zip(hooks, kept, strict=True):
            each.update(before)
