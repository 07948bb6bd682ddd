"""What each rank holds of a run's state is what the formula of ``lockstep show`` and of the first record says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")

from tests.observed import observe
from tests.process_pool import ProcessPool
from tests.test_zero import LONG, ROOT, gpt, zero

SHARDED = {"kind": "fsdp", "fsdp": {"wrap": ["Block"]}}
SMALL_STAY_WHOLE = {"zero_optimization": {"stage3_param_persistence_threshold": 300}}
STRATEGIES = {
    "ddp": {"kind": "ddp"},
    "fsdp": SHARDED,
    "zero 1": zero(1),
    "zero 2": zero(2),
    "zero 3": zero(3),
    "zero 3, small ones whole": zero(3, extra=SMALL_STAY_WHOLE),
}


def held(config: dict[str, Any]) -> dict[str, int]:
    """Train, and return the bytes of this rank's tensors (benchmarks/held_bytes.py)."""
    sys.path.append(str(ROOT / "benchmarks"))
    try:
        from held_bytes import held_bytes
    finally:
        sys.path.pop()
    with held_bytes() as found:
        observe(config)
    return found


def assert_the_formula_holds(pool: ProcessPool, config: dict[str, Any], world_size: int) -> None:
    ranks = pool.run(held, world_size, config)
    formula = json.loads((Path(config["output"]) / "metrics.jsonl").read_text().splitlines()[0])["state_bytes"]
    assert {key: max(rank[key] for rank in ranks) for key in ranks[0]} == {key: formula[key] for key in ranks[0]}
    assert ranks[0].keys() == formula.keys() - {"gathered"}


@pytest.mark.parametrize("name", ["zero 1", "zero 2", "zero 3, small ones whole"])
def test_each_rank_holds_what_the_formula_says(pool: ProcessPool, tmp_path: Path, name: str) -> None:
    precision = "bf16" if name == "zero 1" else "fp32"
    config = gpt(tmp_path, strategy=STRATEGIES[name], precision=precision, limit={"steps": 2})
    assert_the_formula_holds(pool, config, 2)


@LONG
@pytest.mark.parametrize("world_size", [2, 3, 4])  # of 3 the parts are filled up
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_each_rank_holds_what_the_formula_says_on_every_number_of_processes(
    pool: ProcessPool, tmp_path: Path, name: str, precision: str, world_size: int
) -> None:
    config = gpt(tmp_path, strategy=STRATEGIES[name], precision=precision, limit={"steps": 2})
    assert_the_formula_holds(pool, config, world_size)


@LONG
@pytest.mark.parametrize("name", STRATEGIES)
def test_weights_that_are_not_trained_are_counted_too(pool: ProcessPool, tmp_path: Path, name: str) -> None:
    model = {**gpt(tmp_path)["model"], "freeze": ["token_embedding.*", "*.bias"]}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        config = gpt(folder, strategy=STRATEGIES[name], model=model, precision=precision, limit={"steps": 2})
        assert_the_formula_holds(pool, config, 2)


def bucket(config: dict[str, Any]) -> int:
    """Train, and return how many elements DeepSpeed makes room for to reduce gradients."""
    from runtime.strategies.zero.strategy import ZeroStrategy

    found = []
    step = ZeroStrategy.step

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self._engine.optimizer.reduce_bucket_size)
        return step(self, *args, **kwargs)

    ZeroStrategy.step = noting  # type: ignore[method-assign]
    try:
        observe(config)
    finally:
        ZeroStrategy.step = step  # type: ignore[method-assign]
    return int(found[0])


@pytest.mark.parametrize("stage", [pytest.param(2, marks=LONG), 3])
def test_no_more_room_is_made_to_reduce_gradients_than_the_model_has(
    pool: ProcessPool, tmp_path: Path, stage: int
) -> None:
    """DeepSpeed's own default would take 1 or 2 GB, whatever the model's size."""
    assert pool.run(bucket, 2, gpt(tmp_path / "own", strategy=zero(stage), limit={"steps": 1})) == [6960, 6960]
    chosen = zero(stage, extra={"zero_optimization": {"reduce_bucket_size": 4000}})
    assert pool.run(bucket, 2, gpt(tmp_path / "chosen", strategy=chosen, limit={"steps": 1})) == [4000, 4000]
