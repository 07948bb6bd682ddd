"""Memory: micro_size: auto finds what fits on all ranks; where memory runs out, one message says what would fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoints.load import load_state
from runtime.errors import OutOfMemoryError, PeerError
from runtime.model_calls import is_out_of_memory
from tests.observed import assert_bitwise_equal, configuration, observe
from tests.process_pool import ProcessPool


def hungry(folder: Path, fits: int, *, batch: dict[str, Any], **args: Any) -> dict[str, Any]:
    objective = {"target": "tiny_memory:Hungry", "args": {"fits": fits, **args}}
    return configuration(folder, objective=objective, batch=batch, checkpoint={"every": "1 step"})


def slots(folder: Path) -> int:
    return int(load_state(folder / "checkpoints" / "step-00000005")[1]["identity"]["slots"])


def failure(config: dict[str, Any]) -> str:
    try:
        observe(config)
    except OutOfMemoryError as error:
        return str(error)
    except PeerError:
        return "lost contact"
    return "trained"


def test_auto_finds_the_largest_microbatch_of_its_halves_and_changes_nothing_else(tmp_path: Path) -> None:
    auto = observe(hungry(tmp_path / "auto", 5, batch={"global_size": 16, "micro_size": "auto"}))
    assert slots(tmp_path / "auto") == 4  # of 16, 8 and 4 samples the last fits
    known = observe(hungry(tmp_path / "known", 5, batch={"global_size": 16, "micro_size": 4}))
    assert_bitwise_equal(auto, known)
    assert auto["losses"] == known["losses"]


def test_auto_finds_what_fits_on_every_rank(pool: ProcessPool, tmp_path: Path) -> None:
    config = hungry(tmp_path, 3, rank=1, batch={"global_size": 16, "micro_size": "auto"})
    replies = pool.run(observe, 2, config)
    assert slots(tmp_path) == 8
    assert_bitwise_equal(replies[0], replies[1])


def test_a_resumed_run_keeps_what_was_found(tmp_path: Path) -> None:
    config = hungry(tmp_path, 5, batch={"global_size": 16, "micro_size": "auto"})
    observe({**config, "limit": {"steps": 2}})
    config["objective"]["args"]["fits"] = 16  # another device would find more
    observe({**config, "resume": {"allow_changes": ["objective.args.fits"]}})
    assert slots(tmp_path) == 4


def test_a_sample_that_does_not_fit_is_told(tmp_path: Path) -> None:
    message = failure(hungry(tmp_path, 0, batch={"global_size": 16, "micro_size": "auto"}))
    assert "not even one sample fits into the memory of 1 of 1 ranks" in message


@pytest.mark.parametrize("truly", [False, True])
def test_running_out_of_memory_names_rank_step_and_what_would_fit(tmp_path: Path, truly: bool) -> None:
    message = failure(hungry(tmp_path, 3, truly=truly, batch={"global_size": 16, "micro_size": 8}))
    assert message.startswith("rank 0 ran out of memory in ")
    assert "set batch.micro_size to 4 or less (now 8" in message
    assert "More to read" not in message


def test_the_rank_that_ran_out_of_memory_says_so_itself(pool: ProcessPool, tmp_path: Path) -> None:
    replies = pool.run(failure, 2, hungry(tmp_path, 3, rank=1, batch={"global_size": 16, "micro_size": 8}))
    assert replies[0] == "lost contact"
    assert replies[1].startswith("rank 1 ran out of memory in ")


def test_running_out_of_memory_in_an_evaluation_names_its_own_key(tmp_path: Path) -> None:
    config = hungry(tmp_path, 8, batch={"global_size": 16, "micro_size": 8})
    config["data"]["validation"] = {"target": "tiny:points", "args": {"split": "validation"}}
    message = failure({**config, "evaluation": {"every": "2 steps", "micro_size": 32}})
    assert "ran out of memory in evaluate at step 2" in message
    assert "set evaluation.micro_size to 16 or less (now 32)" in message


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory cells"), False),
    ],
)
def test_every_library_that_lacks_memory_is_understood(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
