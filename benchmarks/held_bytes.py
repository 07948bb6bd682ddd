"""What a rank really holds of a run's state: the memory of its tensors, counted once each, whatever the formulas say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def held_bytes() -> Iterator[dict[str, int]]:
    """Let runs note what this rank holds of them: parameters and optimizer in the end, gradients at their most."""
    from runtime.run.trainer import Trainer

    found = {"gradients": 0}
    train = Trainer.train

    def noting(self: Any, windows: Any) -> Any:
        strategy, module, optimizer = self._strategy, self._state.module, self._state.optimizer
        backward = strategy.backward

        def noting_backward(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            found["gradients"] = max(found["gradients"], size_of(gradients(strategy, module)))

        strategy.backward = noting_backward
        reason = train(self, windows)
        of_parameters = [held for p in module.parameters() for held in (p, getattr(p, "ds_tensor", None))]
        flat = [tensor for tensor in optimizer.state if not any(tensor is p for p in module.parameters())]
        states = [value for state in optimizer.state.values() for value in state.values()]
        kept = [value for value in states if isinstance(value, Tensor) and value.ndim]
        found["parameters"] = size_of(of_parameters)
        found["optimizer"] = size_of([*flat, *kept])
        found["buffers"] = size_of(module.buffers())
        return reason

    Trainer.train = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Trainer.train = train  # type: ignore[method-assign]


def gradients(strategy: Any, module: Any) -> Iterator[Tensor | None]:
    """Yield all that holds a part of the gradient, where torch and DeepSpeed keep it."""
    for parameter in module.parameters():
        yield parameter.grad
    engine = getattr(strategy, "_engine", None)
    if engine is not None:
        for of_group in (getattr(engine.optimizer, "averaged_gradients", None) or {}).values():
            yield from of_group or ()
        yield getattr(engine.optimizer, "grad_partitions_flat_buffer", None)


def size_of(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of the memory behind tensors, of which several may share one."""
    found = {}
    for tensor in tensors:
        if tensor is not None:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
