"""Half precision: what is scaled and rounded does not depend on the number of processes, and Accelerate does it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import ConfigurationError
from tests.observed import configuration, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.test_strategies import force_overflow, saved


def half(folder: Path, precision: str, **changes: Any) -> dict[str, Any]:
    """Six slots in float32 weights; four of the nine steps' batches have samples for five of them."""
    return configuration(
        folder,
        **{
            "precision": precision,
            "model": {"target": "tiny:Deep", "args": {"dropout": 0.1}},
            "data": {"train": {"target": "tiny:points", "args": {"dtype": "float32", "size": 53}}},
            "batch": {"global_size": 16, "slots": 6},
            "strategy": {"ddp": {"bucket_mb": 0.01}},
            **changes,
        },
    )


def slot_gradients(config: dict[str, Any]) -> dict[tuple[int, int], str]:
    """Train, and return a digest of each slot's gradient, as the backward pass hands it to the parameters, by step and slot."""
    from runtime.randomness import derive
    from runtime.strategies.ddp import DDPStrategy

    found: dict[tuple[int, int], Any] = {}
    now: list[Any] = [None]
    prepare = DDPStrategy.prepare

    def noting(seed: int, *keys: Any) -> Any:
        now[0] = keys[1:]  # step and slot
        return derive(seed, *keys)

    def hooked(self: Any, module: Any, optimizer: Any, *, slots: int) -> None:
        for parameter in module.parameters():

            def note(gradient: Any) -> None:
                if now[0] is not None and now[0][1] >= 0:  # a filler is slot -1
                    found.setdefault(now[0], hashlib.sha256()).update(gradient.numpy().tobytes())

            parameter.register_hook(note)
        prepare(self, module, optimizer, slots=slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.run.trainer.derive", noting)
        patch.setattr(DDPStrategy, "prepare", hooked)
        observe(config)
    return {key: digest.hexdigest() for key, digest in found.items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_slot_has_the_same_gradient_bit_for_bit_on_any_number_of_processes(
    pool: ProcessPool, tmp_path: Path, precision: str
) -> None:
    """Of the first step, whose weights are the same; a factor of three would round every one of them."""
    changes = {"limit": {"steps": 1}}
    (alone,) = pool.run(slot_gradients, 1, half(tmp_path / "1", precision, **changes))
    assert len(alone) == 6
    for world_size in (2, 3):
        shares = pool.run(slot_gradients, world_size, half(tmp_path / str(world_size), precision, **changes))
        together = {key: digest for share in shares for key, digest in share.items()}
        assert together == alone


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_which_steps_overflow_does_not_depend_on_the_number_of_processes(
    pool: ProcessPool, tmp_path: Path, kind: str
) -> None:
    """The scale begins too high and grows every three steps: each power of two decides differently about some step."""
    changes = {
        "limit": {"steps": 16},
        "optimizer": {"target": "SGD", "args": {"lr": 0.05, "momentum": 0.9}},
        "strategy": {"kind": kind},
    }
    runs = {}
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        runs[world_size] = pool.run(force_overflow, world_size, half(folder, "fp16", **changes), 2.0**19)[0]
        state = saved(folder, 16)
        first = saved(tmp_path / "1", 16)
        assert state["progress"]["skipped_steps"] == first["progress"]["skipped_steps"]
        assert state["strategy"] == first["strategy"]
        assert largest_difference(runs[1], runs[world_size]) < 0.03
    assert len(first["progress"]["skipped_steps"]) >= 3


@pytest.mark.parametrize("target", ["SGD", "Adagrad", "AdamW"])
def test_fp16_trains_sharded_what_it_trains_whole_with_any_optimizer(
    pool: ProcessPool, tmp_path: Path, target: str
) -> None:
    """Torch's fused kernels take the scaler's factors; sharded, most are not fused."""
    args = {"lr": 0.05, "momentum": 0.9} if target == "SGD" else {"lr": 0.01}
    changes = {"optimizer": {"target": target, "args": args}}
    whole = pool.run(observe, 2, half(tmp_path / "whole", "fp16", **changes))[0]
    changes["strategy"] = {"kind": "fsdp"}
    sharded = pool.run(observe, 2, half(tmp_path / "sharded", "fp16", **changes))[0]
    assert whole["losses"] == pytest.approx(sharded["losses"], rel=0.01)
    assert saved(tmp_path / "whole", 5)["progress"] == saved(tmp_path / "sharded", 5)["progress"]


@pytest.mark.single
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_accelerate_does_the_mixed_precision(tmp_path: Path, precision: str) -> None:
    from runtime.strategies.ddp import DDPStrategy

    seen: list[Any] = []
    step, forward = DDPStrategy.step, DDPStrategy.forward

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            enabled = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        accelerator = self._accelerator
        seen.append(
            (accelerator.mixed_precision, enabled, self._scaler is accelerator.scaler, accelerator.scaler is None)
        )
        return step(self, *args, **kwargs)

    def looking(self: Any, batch: Any, *, filler: bool) -> Any:
        loss = forward(self, batch, filler=filler)
        seen.append(loss.output.dtype)
        return loss

    DDPStrategy.step, DDPStrategy.forward = noting, looking  # type: ignore[method-assign]
    try:
        observe(half(tmp_path, precision, limit={"steps": 1}))
    finally:
        DDPStrategy.step, DDPStrategy.forward = step, forward  # type: ignore[method-assign]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert seen[-1] == (precision, dtype, True, precision == "bf16")
    assert set(seen[:-1]) == {dtype}  # and not copied to float32


@pytest.mark.single
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_float16_weights_under_a_loss_scale_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    model = {"target": "tiny:Deep", "args": {"dtype": "float16"}}
    config = half(tmp_path, "fp16", model=model, strategy={"kind": kind})
    with pytest.raises(ConfigurationError, match=r"precision: .*float16 weights \(first.weight\).*float32.*bf16"):
        observe(config)


def test_training_without_zero_imports_no_deepspeed(tmp_path: Path) -> None:
    """Importing it takes over a second and prints a warning."""
    code = (
        "import sys\nfrom tests.observed import configuration\nfrom runtime.session import train\nfrom pathlib import Path\n"
        f"train(configuration(Path({str(tmp_path)!r}), precision='bf16', limit={{'steps': 1}}))\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
