"""What the launcher and the environment say beside the YAML: adopted where it is silent, refused where it differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime import session
from runtime.config.file import load
from runtime.config.launcher import adopt, hidden, overrides
from runtime.errors import ConfigurationError, RunFolderError
from tests.observed import configuration
from tests.process_pool import ProcessPool

ROOT = Path(__file__).parent.parent
FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
# What `accelerate launch` sets where nobody asked for anything (1.15).
DEFAULTS = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "ACCELERATE_USE_CPU": "False",
}
FSDP_DEFAULTS = {
    **FSDP,
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
}
COMPILES = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}

# variables, the key they stand for, its value, another value
SAID = [
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "precision", "bf16", "fp32"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "precision", "fp16", "bf16"),
    (COMPILES, "compile.backend", "inductor", "eager"),
    ({**COMPILES, "ACCELERATE_DYNAMO_MODE": "max-autotune"}, "compile.mode", "max-autotune", "default"),
    ({**COMPILES, "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"}, "compile.fullgraph", True, False),
    ({**COMPILES, "ACCELERATE_DYNAMO_USE_DYNAMIC": "True"}, "compile.dynamic", True, False),
    (FSDP, "strategy.kind", "fsdp", "ddp"),
    ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "strategy.fsdp.cpu_offload", True, False),
    ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "strategy.fsdp.reshard_after_forward", False, True),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "strategy.fsdp.reshard_after_forward", False, True),
    ({**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block,Head"}, "strategy.fsdp.wrap", ["Block", "Head"], ["Block"]),
    (
        {**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "1000"},
        "strategy.fsdp.min_parameters",
        1000,
        2000,
    ),
    (ZERO, "strategy.kind", "zero", "ddp"),
    ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "strategy.zero.stage", 3, 1),
    (
        {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        "strategy.zero.offload_optimizer",
        "cpu",
        None,
    ),
    ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "optimizer.max_grad_norm", 0.5, 1.0),
    ({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/x/ds.json"}, "strategy.zero.file", "/x/ds.json", "/x/other.json"),
]


def with_key(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    section = config
    for name in key.split(".")[:-1]:
        section = section.setdefault(name, {})
    section[key.rpartition(".")[2]] = value
    return config


def written(folder: Path, key: str = "", value: Any = None, **changes: Any) -> Path:
    config = configuration(folder / "run", **changes)
    if key:
        with_key(config, key, value)
        if key.startswith("strategy.") and key != "strategy.kind":
            config["strategy"]["kind"] = key.split(".")[1]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(("variables", "key", "value", "other"), SAID)
def test_a_setting_is_adopted_where_the_yaml_is_silent_and_refused_where_it_differs(
    tmp_path: Path, variables: dict[str, str], key: str, value: Any, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.config.file.zero_problems", lambda *args: [])  # the file is not there
    silent = load(written(tmp_path))
    adopted = adopt(silent, {**DEFAULTS, **variables}, world_size=2)
    assert {wish.key: wish.value for wish in adopted}[key] == value

    alike = load(written(tmp_path, key, value))
    assert key not in {wish.key for wish in adopt(alike, {**DEFAULTS, **variables}, world_size=2)}

    different = load(written(tmp_path, key, other))
    with pytest.raises(ConfigurationError) as raised:
        adopt(different, {**DEFAULTS, **variables}, world_size=2)
    told = next(str(problem) for problem in raised.value.problems if problem.key == key)
    assert str(tmp_path / "config.yaml") in told
    assert list(variables)[-1] in told or "FSDP_" in told


@pytest.mark.parametrize("variables", [DEFAULTS, {**DEFAULTS, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}])
def test_the_launchers_own_defaults_are_no_settings(tmp_path: Path, variables: dict[str, str]) -> None:
    assert adopt(load(written(tmp_path, "precision", "bf16")), variables, world_size=2) == []
    adopted = adopt(load(written(tmp_path)), {**variables, **FSDP_DEFAULTS}, world_size=2)
    assert [wish.key for wish in adopted] == ["strategy.kind"]


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_MIXED_PRECISION": "fp8"},
        {"ACCELERATE_USE_MEGATRON_LM": "true"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
        {**COMPILES, "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True"},
        {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
        {**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many"},
    ],
)
def test_what_no_key_stands_for_is_refused_by_its_name(tmp_path: Path, variables: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=list(variables)[-1]):
        adopt(load(written(tmp_path)), {**DEFAULTS, **variables}, world_size=2)


@pytest.mark.parametrize(
    ("batch", "micro_size"),
    [
        ({"global_size": 16}, 2),
        ({"global_size": 16, "micro_size": None}, 2),
        ({"global_size": 16, "slots": 8}, None),
        ({"global_size": 16, "micro_size": 2}, None),
        ({"global_size": 10}, 2),
        ({"global_size": 10, "micro_size": 2}, None),
        ({"global_size": 16, "slots": 4}, "refused"),
        ({"global_size": 16, "micro_size": 16}, "refused"),
        ({"global_size": 16, "micro_size": "auto"}, "refused"),
    ],
)
def test_an_accumulation_becomes_a_microbatch_of_a_size_that_makes_it(
    tmp_path: Path, batch: dict[str, Any], micro_size: Any
) -> None:
    loaded = load(written(tmp_path, batch=batch))
    variables = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    if micro_size == "refused":
        with pytest.raises(ConfigurationError, match=r"config.yaml.*ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
            adopt(loaded, variables, world_size=2)
        return
    adopted = adopt(loaded, variables, world_size=2)
    assert [wish.value for wish in adopted] == ([] if micro_size is None else [micro_size])


def test_a_section_that_is_written_as_a_whole_says_all_of_its_keys(tmp_path: Path) -> None:
    for section in (True, False):
        with pytest.raises(ConfigurationError, match=r"config.yaml.*ACCELERATE_DYNAMO_BACKEND"):
            adopt(load(written(tmp_path, compile=section)), {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, world_size=1)


def test_a_whole_file_of_the_backend_is_adopted(tmp_path: Path) -> None:
    content = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "bf16": {"enabled": True},
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 4,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    (tmp_path / "ds.json").write_text(json.dumps(content))
    path = written(tmp_path, batch={"global_size": 16})
    variables = {**DEFAULTS, **ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    adopted = load(path, overrides(adopt(load(path), variables, world_size=2))).values
    zero = adopted.strategy.zero
    assert (adopted.strategy.kind, zero.stage, zero.offload_optimizer.device) == ("zero", 3, "cpu")  # type: ignore[union-attr]
    assert (adopted.precision, adopted.optimizer.max_grad_norm, adopted.batch.micro_size) == ("bf16", 0.5, 2)


def bf16_run(config: dict[str, Any]) -> tuple[list[str], str]:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    try:
        result = session.train(config)
    finally:
        assert os.environ.pop("ACCELERATE_MIXED_PRECISION") == "bf16"  # another run of this process finds it again
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    told = [record["text"] for record in records if record["event"] == "message"]
    return told, yaml.safe_load((result.folder / "config.yaml").read_text())["precision"]


def test_what_is_adopted_is_told_is_part_of_the_run_and_is_wanted_on_resumption(
    pool: ProcessPool, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "run", limit={"steps": 2})
    told, precision = pool.run(bf16_run, 2, config)[0]
    assert precision == "bf16"
    assert [text for text in told if "precision: bf16" in text and "ACCELERATE_MIXED_PRECISION" in text]
    with pytest.raises(RunFolderError, match="precision: was 'bf16', is 'fp32'"):
        session.train({**config, "limit": {"steps": 3}})


def test_accelerate_itself_finds_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # its backward would divide by them
    with hidden():
        assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in os.environ
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"


def test_accelerate_launchs_configuration_file_is_heard(tmp_path: Path) -> None:
    (tmp_path / "accelerate.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\nuse_cpu: true\n"
        "num_processes: 1\nnum_machines: 1\nmachine_rank: 0\ndebug: false\n"
    )
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    unwanted = ("ACCELERATE_", "WORLD_SIZE", "RANK", "LOCAL_", "MASTER_", "LOCKSTEP_")
    done = subprocess.run(
        [*line, str(ROOT / "runtime" / "train.py"), str(written(tmp_path, "precision", "fp32"))],
        env={key: value for key, value in os.environ.items() if not key.startswith(unwanted)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert f"{tmp_path / 'config.yaml'}" in done.stderr
    assert "is 'fp32', but ACCELERATE_MIXED_PRECISION" in done.stderr
