"""TrainJobs: what Kubeflow's models make of them, and what its Trainer would start."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

pytest.importorskip("kubeflow_trainer_api", reason="needs the extra dev")
from kubeflow_trainer_api import models

from launch import node
from launch.kubernetes.manifests import manifests
from launch.kubernetes.pods import TrainingRuntime, Volume, WorkloadKind
from runtime.arguments import parsed
from runtime.cli import main
from tests.kubeflow_trainer import ANCESTOR, TORCH_DISTRIBUTED, jobset_spec, pod
from tests.test_kubernetes import KINDS, documents, filled_in, job, pods
from tests.test_submit_kubernetes import COMMAND, VOLUME, here, with_kubectl

__all__ = ["here"]  # a fixture
MODELS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "ClusterTrainingRuntime": models.TrainerV1alpha1ClusterTrainingRuntime,
}
OWN, INSTALLED = documents(KINDS["trainjob"]), documents(KINDS["trainjob-runtime"])


def known(document: dict[str, Any]) -> dict[str, Any]:
    """What Kubeflow's models keep of a document: they drop what they do not know."""
    read = MODELS[document["kind"]].from_dict(document)
    assert read is not None
    return read.to_dict()


# What the models say


@pytest.mark.parametrize(
    "document", [OWN["TrainJob"], OWN["TrainingRuntime"], INSTALLED["TrainJob"], TORCH_DISTRIBUTED]
)
def test_it_is_one_to_the_models_of_kubeflow(document: dict[str, Any]) -> None:
    assert known(document) == document


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (OWN["TrainJob"], "spec"),
        (OWN["TrainJob"], "spec.runtimeRef"),
        (OWN["TrainJob"], "spec.trainer"),
        (OWN["TrainJob"], "spec.trainer.env.0"),
        (OWN["TrainJob"], "spec.trainer.resourcesPerNode"),
        (OWN["TrainingRuntime"], "spec.mlPolicy"),
        (OWN["TrainingRuntime"], "spec.template.spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0"),
        (OWN["TrainingRuntime"], "spec.template.spec.replicatedJobs.0.template.spec.template.spec.containers.0"),
        (INSTALLED["TrainJob"], "spec.runtimePatches.0"),
        (
            INSTALLED["TrainJob"],
            "spec.runtimePatches.0.trainingRuntimeSpec.template.spec.replicatedJobs.0.template.spec.template.spec.volumes.0",
        ),
    ],
)
def test_the_models_would_tell_a_key_that_is_misspelt(document: dict[str, Any], place: str) -> None:
    document = deepcopy(document)
    inner: Any = document
    for key in place.split("."):
        inner = inner[int(key)] if key.isdigit() else inner[key]
    inner["imagee"] = "x"
    assert known(document) != document


def test_a_runtime_is_patched_only_where_the_api_lets_patches_in() -> None:
    """Less than what a runtime may say: an installed one's folder to work in and its restart policy are not to be changed."""
    document = deepcopy(INSTALLED["TrainJob"])
    (patched,) = document["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod(patched)["containers"][0]["workingDir"] = "/workspace"
    pod(patched)["restartPolicy"] = "Never"
    kept = known(document)["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    assert "workingDir" not in pod(kept)["containers"][0]
    assert "restartPolicy" not in pod(kept)


# What the Trainer starts


def test_the_trainer_makes_of_a_runtime_of_ours_the_jobset_that_we_would() -> None:
    made = jobset_spec(OWN["TrainJob"], OWN["TrainingRuntime"])
    expected = deepcopy(documents(KINDS["jobset"])["JobSet"]["spec"])
    expected["replicatedJobs"][0]["template"]["metadata"] = {"labels": {ANCESTOR: "trainer"}}
    assert made == expected


def test_the_runtime_comes_before_the_trainjob_that_would_be_refused_without_it() -> None:
    assert [*OWN] == ["ConfigMap", "TrainingRuntime", "TrainJob"]
    assert [*INSTALLED] == ["ConfigMap", "TrainJob"]


def test_pods_of_an_installed_runtime_train_what_was_submitted_where_it_was_asked_for() -> None:
    made = jobset_spec(INSTALLED["TrainJob"], TORCH_DISTRIBUTED)
    (replicated,) = made["replicatedJobs"]
    (container,) = pod(replicated)["containers"]
    assert replicated["template"]["spec"]["completions"] == 4
    # Whatever the runtime runs: the image's entrypoint forwards SIGTERM; `env --chdir` becomes what follows.
    assert container["command"] == ["tini", "--", "env", "--chdir=/workspace"]
    assert container["image"] == job().image
    args = [filled_in(argument, {"JOB_COMPLETION_INDEX": "3"}) for argument in container["args"]]
    assert args[:3] == ["python", "-m", "launch.node"]
    options = parsed(node._parser(), args[3:])
    assert (options.config, options.nodes, options.node_rank) == (job().config, 4, 3)
    assert options.main_address == "digits-node-0-0.digits"
    environment = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    assert environment["WANDB_API_KEY"] == {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
    assert environment["PYTHONSAFEPATH"] == "1"
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"/workspace/configs/digits.yaml", "/dev/shm", "/workspace/runs", "/data"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        each["name"] for each in pod(replicated)["volumes"]
    }
    assert pod(replicated)["securityContext"]["runAsNonRoot"] is True
    assert pod(replicated)["terminationGracePeriodSeconds"] >= 2 * job().grace_seconds
    labels = replicated["template"]["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == "digits"


def test_what_an_installed_runtime_brings_of_its_own_stays() -> None:
    """Its volumes, variables, resources and policies; and its /dev/shm becomes ours, which Kubernetes mounts once only."""
    runtime = deepcopy(TORCH_DISTRIBUTED)
    runtime["spec"]["template"]["spec"]["failurePolicy"] = {"maxRestarts": 3}
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod(replicated)["volumes"] = [{"name": "cache", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "cache", "mountPath": "/cache"}, {"name": "shm", "mountPath": "/dev/shm"}]
    pod(replicated)["containers"][0] |= {"env": [{"name": "A", "value": "1"}], "volumeMounts": mounts}
    made = jobset_spec(INSTALLED["TrainJob"], runtime)
    (container,) = pod(made["replicatedJobs"][0])["containers"]
    assert made["failurePolicy"] == {"maxRestarts": 3}
    assert {"name": "A", "value": "1"} in container["env"]
    assert {"name": "cache", "mountPath": "/cache"} in container["volumeMounts"]
    assert [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"] == [
        "shared-memory"
    ]


def test_a_folder_to_work_in_arrives_as_it_is_called() -> None:
    folder = "/work $(HOME)/it's"
    changes = {"working_folder": Path(folder), "run_folder": Path(folder) / "runs"}
    asked = pods(
        kind=WorkloadKind.TRAINJOB, runtime=TrainingRuntime("x"), volumes=[Volume("runs", PurePosixPath(folder))]
    )
    trainer = documents(manifests(job(**changes), asked))["TrainJob"]["spec"]["trainer"]
    assert [filled_in(word, {"HOME": "/root"}) for word in trainer["command"]][-1] == f"--chdir={folder}"


# lockstep submit kubernetes --trainjob


def submitted(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*COMMAND, *VOLUME, *arguments]) == 0
    return documents(capsys.readouterr().out)


@pytest.mark.usefixtures("here")
def test_a_trainjob_has_a_runtime_of_its_own_or_the_one_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    own = submitted(capsys, "--trainjob", "--nodes", "2", "--max-requeues", "7")
    assert own["TrainJob"]["spec"]["runtimeRef"]["kind"] == own["TrainingRuntime"]["kind"] == "TrainingRuntime"
    assert own["TrainingRuntime"]["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert own["TrainJob"]["spec"]["trainer"]["numNodes"] == 2
    assert jobset_spec(own["TrainJob"], own["TrainingRuntime"])["failurePolicy"]["maxRestarts"] == 7
    for text, kind, name in (
        ("torch-distributed", "ClusterTrainingRuntime", "torch-distributed"),
        ("trainingruntime/ours", "TrainingRuntime", "ours"),
    ):
        found = submitted(capsys, "--trainjob", "--runtime", text)
        assert "TrainingRuntime" not in found
        reference = {"apiGroup": "trainer.kubeflow.org", "kind": kind, "name": name}
        assert found["TrainJob"]["spec"]["runtimeRef"] == reference


@pytest.mark.usefixtures("here")
def test_no_secret_gets_into_a_trainjob(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    for more in ([], ["--runtime", "torch-distributed"]):
        assert main([*COMMAND, *VOLUME, "--trainjob", *more, "--secret", "WANDB_API_KEY=wandb"]) == 0
        told = capsys.readouterr()
        assert "hunter2" not in told.out + told.err
        environment = documents(told.out)["TrainJob"]["spec"]["trainer"]["env"]
        reference = {"secretKeyRef": {"name": "wandb", "key": "WANDB_API_KEY"}}
        assert {"name": "WANDB_API_KEY", "valueFrom": reference} in environment


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--runtime", "x"], "--runtime: needs --trainjob"),
        (["--jobset", "--runtime", "x"], "--runtime: needs --trainjob"),
        (["--trainjob", "--runtime", "A b"], "--runtime: 'A b' is not a valid name of a runtime"),
        (
            ["--trainjob", "--runtime", "x", "--max-requeues", "3"],
            "--max-requeues: is decided by the installed runtime",
        ),
        (["--trainjob", "--env", "MY_TOKEN=x"], "MY_TOKEN: is a secret: store it in a Secret of the cluster"),
    ],
)
def test_what_no_trainjob_can_be_is_told_by_key(
    capsys: pytest.CaptureFixture[str], arguments: list[str], what: str
) -> None:
    assert main([*COMMAND, *VOLUME, *arguments]) == 2
    told = capsys.readouterr()
    assert (told.out, what in told.err) == ("", True), told.err


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--runtime", "jobset/x"], "'jobset/x' is not of the form NAME or trainingruntime/NAME"),
        (["--runtime", ""], "'' is not of the form"),
        (["--jobset"], "not allowed with argument"),
    ],
)
def test_options_that_mean_nothing_beside_it_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], what: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*COMMAND, *VOLUME, "--trainjob", *arguments])
    assert left.value.code == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "made"),
    [([], "trainjob,trainingruntime,configmap"), (["--runtime", "torch-distributed"], "trainjob,configmap")],
)
def test_how_to_stop_it_and_what_to_remove_is_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str], made: str
) -> None:
    with_kubectl(here, monkeypatch, "cat > /dev/null")
    assert main([*COMMAND, *VOLUME, "--trainjob", *arguments, "--apply"]) == 0
    told = capfd.readouterr().err
    assert 'kubectl patch trainjob digits --type merge --patch \'{"spec":{"suspend":true}}\'' in told
    assert f"kubectl delete {made} --selector app.kubernetes.io/instance=digits" in told
