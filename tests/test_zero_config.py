"""DeepSpeed's JSON follows from the YAML; what contradicts it, or would be ignored, is told with both places."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.config.file import LoadedConfiguration, load
from runtime.config.zero_json import generate
from runtime.errors import ConfigurationError, MissingDependencyError

LINES = """\
model: {target: "zoo:Net"}
data: {train: "zoo:points"}
batch: {global_size: 64, micro_size: 8}
objective: MSELoss
precision: bf16
optimizer:
  target: AdamW
  args: {lr: 0.001}
  max_grad_norm: 1.0
limit: {steps: 3}
strategy:
  kind: zero
  zero:
    stage: 3
"""


def loaded(folder: Path, more: str = "", *overrides: str, lines: str = LINES) -> LoadedConfiguration:
    path = folder / "run.yaml"
    path.write_text(lines + more)
    return load(path, overrides)


def told(folder: Path, more: str = "", *overrides: str, lines: str = LINES) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        loaded(folder, more, *overrides, lines=lines)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def with_file(folder: Path, content: Any) -> str:
    (folder / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    return "    file: ds.json\n"


def test_the_json_follows_from_the_yaml(tmp_path: Path) -> None:
    run = loaded(tmp_path, "    offload_optimizer: cpu\n    offload_parameters: {device: nvme, path: /disk}\n")
    made = generate(run.values, run.where.beside)
    assert made["bf16"] == {"enabled": True}
    assert made["fp16"] == {"enabled": False}
    assert made["gradient_clipping"] == 1.0
    assert made["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "nvme", "nvme_path": "/disk"},
    }
    # The division is Lockstep's: whatever the batch, the engine is told of one microbatch and no accumulation.
    assert made["train_micro_batch_size_per_gpu"] == made["gradient_accumulation_steps"] == 1
    assert made["zero_force_ds_cpu_optimizer"] is False


def test_what_is_generated_is_known_to_the_package(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from runtime.config.zero_json import _OF_ZERO

    names = {name for key, field in DeepSpeedZeroConfig.model_fields.items() for name in (key, field.alias)}
    assert names >= _OF_ZERO


def test_extra_is_merged_in(tmp_path: Path) -> None:
    run = loaded(
        tmp_path, "    extra: {communication_data_type: fp32, zero_optimization: {reduce_bucket_size: 1000}}\n"
    )
    made = generate(run.values, run.where.beside)
    assert made["communication_data_type"] == "fp32"
    assert made["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 1000}


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "offload_param": {"device": "none"},
    },
}


def test_auto_in_a_file_is_filled_in_from_the_yaml(tmp_path: Path) -> None:
    run = loaded(tmp_path, with_file(tmp_path, AUTO))
    made = generate(run.values, run.where.beside)
    assert "auto" not in json.dumps(made)
    assert made["gradient_clipping"] == 1.0
    assert made["bf16"]["enabled"] is True
    assert made["zero_optimization"]["overlap_comm"] is True
    assert "optimizer" not in made  # the YAML's is passed as an object


def test_a_file_that_says_the_same_is_taken(tmp_path: Path) -> None:
    same = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1,
        "fp16": {"enabled": False},
    }
    run = loaded(tmp_path, with_file(tmp_path, same))
    assert generate(run.values, run.where.beside)["train_micro_batch_size_per_gpu"] == 1


@pytest.mark.parametrize(
    ("extra", "place", "other", "said"),
    [
        ("{gradient_clipping: 0.5}", "run.yaml:15 strategy.zero.extra.gradient_clipping", "run.yaml:9", "1.0"),
        ("{train_batch_size: 32}", "run.yaml:15 strategy.zero.extra.train_batch_size", "run.yaml:3", "64"),
        ("{bf16: {enabled: false}}", "run.yaml:15 strategy.zero.extra.bf16.enabled", "run.yaml:5", "True"),
        ("{zero_optimization: {stage: 2}}", "extra.zero_optimization.stage", "run.yaml:14", "3"),
        ("{optimizer: {type: Lamb}}", "extra.optimizer.type", "run.yaml:7", "AdamW"),
        ("{optimizer: {params: {lr: 0.1}}}", "extra.optimizer.params.lr", "run.yaml:8", "0.001"),
        (
            "{optimizer: {params: {betas: [0.9, 0.95]}}}",
            "extra.optimizer.params.betas",
            "run.yaml:8",
            "does not set it",
        ),
    ],
)
def test_a_contradiction_is_told_with_both_places(
    tmp_path: Path, extra: str, place: str, other: str, said: str
) -> None:
    (message,) = told(tmp_path, f"    extra: {extra}\n")
    assert place in message
    assert other in message
    assert said in message


def test_a_file_contradicts_with_its_own_line(tmp_path: Path) -> None:
    content = {"gradient_clipping": 0.5, "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}
    problems = told(tmp_path, with_file(tmp_path, content))
    assert [problem.split(": ")[0] for problem in problems] == [
        "ds.json:2 gradient_clipping",
        "ds.json:4 zero_optimization.stage",
        "ds.json:6 zero_optimization.offload_param.device",
    ]
    assert all("run.yaml:" in problem for problem in problems)


def test_a_file_and_extra_contradict_each_other(tmp_path: Path) -> None:
    more = with_file(tmp_path, {"zero_optimization": {"sub_group_size": 5}})
    (message,) = told(tmp_path, more + "    extra: {zero_optimization: {sub_group_size: 6}}\n")
    assert message.startswith(
        "run.yaml:16 strategy.zero.extra.zero_optimization.sub_group_size: 6 contradicts ds.json:3"
    )


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("{gradient_cliping: 1.0}", "did you mean 'gradient_clipping'?"),
        ("{zero_optimization: {reduce_bucket: 5}}", "did you mean 'reduce_bucket_size'?"),
        ("{scheduler: {type: WarmupLR}}", "schedule"),
        ("{zero_optimization: {zero_quantized_gradients: true}}", "depend on the processes"),
        ("{gradient_predivide_factor: 2.0}", "divided once"),
        ("{tensorboard: {enabled: true}}", "reporting"),
    ],
)
def test_what_would_be_ignored_or_change_the_answer_is_refused(tmp_path: Path, extra: str, said: str) -> None:
    (message,) = told(tmp_path, f"    extra: {extra}\n")
    assert said in message
    assert message.startswith("run.yaml:15 ")


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "ds.json: is not JSON"), ("[1]", "must be a mapping"), ('{"fp16": {}, "fp16": {}}', "written twice")],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, content: str, said: str) -> None:
    assert said in told(tmp_path, with_file(tmp_path, content))[0]


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    (message,) = told(tmp_path, "    file: nowhere.json\n")
    assert message.startswith("run.yaml:15 strategy.zero.file: ")
    assert "nowhere.json cannot be read: No such file" in message


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("strategy.zero.stage=0", "strategy.zero.stage", "use strategy.kind: ddp"),
        ("strategy.zero.stage=4", "strategy.zero.stage", "use 1, 2 or 3"),
        ("strategy.zero.offload_optimizer=nvme", "strategy.zero.offload_optimizer.path", "needs the folder"),
        ("strategy.zero.offload_optimizer={device: cpu, path: /x}", "strategy.zero.offload_optimizer.path", "nvme"),
        ("optimizer.target=Muon", "optimizer.target", "whole matrices"),
        ("optimizer.target=Adagrad", "optimizer.target", "rebuilds Adagrad"),
        ("batch.micro_size=auto", "batch.micro_size", "give a number"),
        ("compile={blocks: [Block]}", "compile", "stage 3"),
        ("batch_norm=sync", "batch_norm", "needs strategy.kind: ddp"),
    ],
)
def test_what_cannot_go_together_is_refused(tmp_path: Path, override: str, key: str, said: str) -> None:
    (message,) = told(tmp_path, "", override)
    assert message.startswith(f"command line {key}: ")
    assert said in message


def test_what_only_stage_3_can_do_is_refused_below_it(tmp_path: Path) -> None:
    problems = told(tmp_path, "    offload_parameters: cpu\n", "strategy.zero.stage=2")
    assert "only stage 3 can offload them" in problems[0]
    offload = "strategy.zero.offload_optimizer={device: nvme, path: /x}"
    assert "nvme needs stage 3" in told(tmp_path, "", "strategy.zero.stage=2", offload)[0]


def test_clipping_by_value_and_gradual_unfreezing_are_refused(tmp_path: Path) -> None:
    (message,) = told(tmp_path, lines=LINES.replace("max_grad_norm: 1.0", "max_grad_value: 1.0"))
    assert message.startswith("run.yaml:9 optimizer.max_grad_value: DeepSpeed clips by norm only")
    frozen = LINES.replace('"zoo:Net"}', '"zoo:Net", freeze: ["a.*"], unfreeze: [{epoch: 2, match: ["a.*"]}]}')
    (message,) = told(tmp_path, lines=frozen)
    assert message.startswith("run.yaml:1 model.unfreeze: with strategy.kind: zero the trained parameters are fixed")


def test_options_of_zero_beside_another_strategy_are_not_ignored(tmp_path: Path) -> None:
    (message,) = told(tmp_path, "", "strategy.kind=ddp")
    assert message == "run.yaml:13 strategy.zero: is ignored with kind: ddp; leave it out"


def test_the_missing_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.strategies.zero.requirements import check_requirements

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lockstep-train\[deepspeed\]'"):
        check_requirements(loaded(tmp_path).values.strategy)


def test_checking_needs_neither_torch_nor_the_package(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(LINES)
    code = (
        "import sys; from pathlib import Path; from runtime.config.file import load; load(Path(sys.argv[1]))\n"
        "sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.yaml")], check=False).returncode == 0
