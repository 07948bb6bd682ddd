"""All ranks hold the same weights at every save: random updates draw alike, and a rank that has parted ends the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import ConfigurationError
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool, RemoteError
from tests.test_resumption import observe_stopping


def langevin(folder: Path, **args: Any) -> dict[str, Any]:
    return configuration(folder, optimizer={"target": "tiny_parting:Langevin", "args": {"lr": 0.05, **args}})


def test_an_update_that_draws_draws_alike_on_any_number_of_processes(pool: ProcessPool, tmp_path: Path) -> None:
    alone = pool.run(observe, 1, langevin(tmp_path / "1"))[0]
    together = pool.run(observe, 3, langevin(tmp_path / "3"))
    for rank in together:
        assert_bitwise_equal(rank, together[0])
    assert largest_difference(alone, together[0]) < 1e-10
    pool.run(observe_stopping, 2, langevin(tmp_path / "2"), 2)
    assert largest_difference(alone, pool.run(observe, 2, langevin(tmp_path / "2"))[0]) < 1e-10


@pytest.mark.parametrize("offender", ["optimizer", "model"])
def test_ranks_that_have_parted_end_the_run_before_it_is_saved(
    pool: ProcessPool, tmp_path: Path, offender: str
) -> None:
    config = langevin(tmp_path, own=True)
    if offender == "model":
        config = configuration(tmp_path, model={"target": "tiny_parting:Wandering", "args": {}})
    with pytest.raises(RemoteError) as ended:
        pool.run(observe, 2, config)
    assert str(ended.value).count("RanksDifferError: net.0.weight") == 2  # on both ranks
    assert "not the same on all ranks, so nothing was saved" in str(ended.value)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64", "complex128", "float8_e5m2"])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_bit_is_noticed_in_every_type_and_layout(pool: ProcessPool, dtype: str, transposed: bool) -> None:
    replies = pool.run(comparing, 2, dtype, transposed)
    assert replies[0] == replies[1]
    assert replies[0][0] == ""
    assert replies[0][1].startswith("other: not the same on all ranks")


def comparing(dtype: str, transposed: bool) -> list[str]:
    import torch.distributed as dist

    from runtime.distributed.rank_consistency import compare_values
    from runtime.errors import RanksDifferError

    dist.init_process_group("gloo")
    try:
        same = torch.arange(6.0).view(2, 3).to(getattr(torch, dtype))
        same = same.T if transposed else same
        other = same.clone()
        if dist.get_rank() == 1:
            (other.T if transposed else other).view(torch.uint8).view(-1)[0] ^= 1
        said = []
        for tensors in ({"same": same}, {"same": same, "other": other}):
            try:
                compare_values(tensors, torch.device("cpu"))
                said.append("")
            except RanksDifferError as error:
                said.append(str(error))
        return said
    finally:
        dist.destroy_process_group()


@pytest.mark.single
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp16"}, r"precision: .*complex gradients \(turn\)"),
        ({"optimizer": {"target": "SGD", "args": {"lr": 0.1}, "max_grad_value": 1.0}}, r"max_grad_value: .*max_grad_norm"),
    ],
)  # fmt: skip
def test_what_torch_cannot_do_with_complex_gradients_is_refused_by_name(
    tmp_path: Path, kind: str, changes: dict[str, Any], words: str
) -> None:
    config = configuration(
        tmp_path, model={"target": "tiny_parting:Turning", "args": {}}, strategy={"kind": kind}, **changes
    )
    with pytest.raises(ConfigurationError, match=words):
        observe(config)
