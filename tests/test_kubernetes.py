"""Manifests: what Kubernetes' schemas, JobSet's models and kubectl's parser make of them; what becomes of a pod that ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("kubernetes_validate", reason="needs the extra dev")
import kubernetes_validate
from kubeflow_trainer_api import models
from kubernetes_validate.utils import all_versions, major_minor

from launch import node
from launch.job import JobSpec
from launch.kubernetes.manifests import manifests, object_name
from launch.kubernetes.pods import Pods, SecretKey, TrainingRuntime, Volume, WorkloadKind
from launch.kubernetes.yaml_text import manifest_text
from runtime.arguments import parsed
from runtime.errors import ConfigurationError, LockstepError
from tests.kubeflow_trainer import jobset_spec

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
VERSIONS = sorted({major_minor(version) for version in all_versions()}, key=lambda text: int(text.split(".")[1]))[-5:]
HOSTILE = [
    *("1e-3", "y", "no", "0o17", "0x1f", "12:30", "1_000", "~", "", "null", ".5", "-1", "+1", "=", "<<", "2026-11-22"),
    *(
        "$(HOME)",
        "$$(HOME)",
        "$",
        "a$",
        "$$",
        "$(",
        "it's",
        '"q"',
        "a: b",
        "#c",
        "a #c",
        "- a",
        "{a}",
        "*a",
        "&a",
        "!a",
        "%a",
    ),
    *(
        "`id`",
        "; rm -rf /",
        "é",
        "日本",
        "😀",
        " lead",
        "trail ",
        "\\n",
        "--- a",
        "@a",
        "|",
        ">",
        "?",
        "a:",
        "Yes",
        "OFF",
    ),
]


def job(**changes: Any) -> JobSpec:
    """A job of four machines, as it is in the container."""
    values: dict[str, Any] = {
        "script": Path("train.py"),
        "config": Path("/workspace/configs/digits.yaml"),
        "overrides": ["limit.epochs=5"],
        "nodes": 4,
        "processes_per_node": 8,
        "use_gpus": True,
        "name": "digits",
        "run_folder": Path("/workspace/runs/digits"),
        "working_folder": Path("/workspace"),
        "environment": {"NCCL_DEBUG": "WARN"},
        "secrets": ["WANDB_API_KEY"],
        "image": "registry.example/lockstep:0.1.0",
    }
    return JobSpec(**{**values, **changes})


def pods(**changes: Any) -> Pods:
    values: dict[str, Any] = {
        "config_text": "name: digits\n\nseed: 0\n",
        "namespace": "research",
        "volumes": [
            Volume("runs", PurePosixPath("/workspace/runs")),
            Volume("/srv/data", PurePosixPath("/data"), read_only=True),
        ],
        "secrets": {"WANDB_API_KEY": SecretKey("wandb", "api-key")},
        "cpus": 32,
        "memory": "256Gi",
    }
    return Pods(**{**values, **changes})


ON_CPUS = {"nodes": 1, "processes_per_node": 2, "use_gpus": False, "secrets": [], "environment": {}}
KINDS = {
    "job": manifests(job(), pods()),
    "jobset": manifests(job(), pods(kind=WorkloadKind.JOBSET)),
    "trainjob": manifests(job(), pods(kind=WorkloadKind.TRAINJOB)),
    "trainjob-runtime": manifests(
        job(), pods(kind=WorkloadKind.TRAINJOB, runtime=TrainingRuntime("torch-distributed"))
    ),
    "one-machine": manifests(job(**ON_CPUS), pods(secrets={}, cpus=None, memory=None, namespace=None)),
}


MADE = [kind for kind in KINDS if kind != "trainjob-runtime"]  # what becomes of whose pods is for us to say


def documents(text: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def job_spec(text: str) -> dict[str, Any]:
    found = documents(text)
    if "Job" in found:
        return found["Job"]["spec"]
    made = jobset_spec(found["TrainJob"], found["TrainingRuntime"]) if "TrainJob" in found else found["JobSet"]["spec"]
    (replicated,) = made["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_spec(text: str) -> dict[str, Any]:
    return job_spec(text)["template"]["spec"]


def container(text: str) -> dict[str, Any]:
    (only,) = pod_spec(text)["containers"]
    return only


def filled_in(text: str, variables: dict[str, str]) -> str:
    """What a container gets of an argument: $(NAME) is filled in where NAME is set, and of $$ one is left."""
    # https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables
    return re.sub(
        r"\$(?:\$|\(([^)]*)\))",
        lambda found: "$" if found[1] is None else variables.get(found[1], found[0]),
        text,
    )


# What it looks like


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifests_are_those_that_were_reviewed(kind: str) -> None:
    """To renew them after a change on purpose, and to review what has changed: python -m tests.test_kubernetes."""
    assert KINDS[kind] == (GOLDEN / f"kubernetes-{kind}.yaml").read_text()


# What others say of it


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["job", "one-machine"])
def test_the_manifests_fit_the_schemas_of_kubernetes(kind: str, version: str) -> None:
    for document in documents(KINDS[kind]).values():
        assert kubernetes_validate.validate(document, version, strict=True) == version


@pytest.mark.parametrize("place", ["metadata", "spec", "spec.template.spec", "spec.podFailurePolicy.rules.0"])
def test_the_schemas_would_tell_a_key_that_is_misspelt(place: str) -> None:
    document = documents(KINDS["job"])["Job"]
    inner = document
    for key in place.split("."):
        inner = inner[int(key)] if key.isdigit() else inner[key]
    inner["restartsPolicy"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


def test_a_jobset_is_one_to_the_models_of_jobset() -> None:
    """The models drop what they do not know, so all that went in has to come out."""
    document = documents(KINDS["jobset"])["JobSet"]
    read = models.JobsetV1alpha2JobSet.from_dict(document)
    assert read is not None
    assert read.to_dict() == document
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job_spec(KINDS["jobset"])}
    for version in VERSIONS:
        kubernetes_validate.validate(inner, version, strict=True)


def tool(name: str) -> str:
    """The path of a command that the extra ``dev`` brings."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ["PATH"]]))
    return found or pytest.skip(f"there is no {name} for this platform")


def kubectl_reads(text: str, folder: Path) -> list[dict[str, Any]]:
    """What the Go parser behind kubectl makes of YAML; no cluster is asked."""
    path = folder / "manifests.yaml"
    path.write_text(text)
    line = [tool("kubectl"), "annotate", "--local", "--filename", str(path), "read=yes", "--output", "json"]
    environment = {**os.environ, "KUBECONFIG": os.devnull, "HOME": str(folder)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    decoder, rest, found = json.JSONDecoder(), done.stdout, []
    while rest.strip():
        document, end = decoder.raw_decode(rest := rest.lstrip())
        assert document["metadata"].pop("annotations") == {"read": "yes"}
        found.append(document)
        rest = rest[end:]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_kubectl_reads_what_was_meant(kind: str, tmp_path: Path) -> None:
    assert kubectl_reads(KINDS[kind], tmp_path) == list(yaml.safe_load_all(KINDS[kind]))


@pytest.mark.parametrize("kind", WorkloadKind)
def test_kubectl_reads_hostile_values_as_the_texts_they_are(kind: WorkloadKind, tmp_path: Path) -> None:
    environment = {f"V{number}": value for number, value in enumerate(HOSTILE)}
    overrides = [f"name={value}" for value in HOSTILE]
    config_text = "\n".join(HOSTILE) + "\n \n\ttab \n\n"
    hostile = job(name="$(a) b; c", environment=environment, overrides=overrides)
    text = manifests(hostile, pods(config_text=config_text, kind=kind))
    config, *_ = read = kubectl_reads(text, tmp_path)
    assert config["data"] == {"run.yaml": config_text}
    only = container(manifest_text(read))
    given_out = {
        entry["name"]: filled_in(entry["value"], {"HOME": "/root"}) for entry in only["env"] if "value" in entry
    }
    assert {name: given_out[name] for name in environment} == environment
    arrived = [filled_in(argument, {"HOME": "/root", "JOB_COMPLETION_INDEX": "3"}) for argument in only["args"]]
    assert arrived[4 : 4 + len(HOSTILE)] == overrides
    assert arrived[-2:] == ["--node-rank", "3"]


TEXTS = st.text(
    st.one_of(st.sampled_from("\n \t#:-|>'\"$a1\r\u2028\x85\ufeff\x7f"), st.characters(codec="utf-8")), max_size=12
)
COMMENTS = st.text("ab #:-'\"\n", max_size=200)
NESTED = st.recursive(
    st.one_of(TEXTS, st.booleans(), st.integers()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(TEXTS.filter(lambda key: not key.startswith("#") and "\n" not in key), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b c", "y", "1"]), NESTED, min_size=1, max_size=3), COMMENTS)
def test_any_data_survives_its_yaml_whatever_is_said_about_it(data: dict[str, Any], comment: str) -> None:
    said: dict[str, Any] = {}
    for key, value in data.items():
        said |= {f"#{key}": comment, key: value}
    assert list(yaml.safe_load_all(manifest_text([said, data]))) == [data, data]


# What becomes of a pod that ends


def becomes_of(policy: dict[str, Any], *, exit_code: int, disrupted: bool = False) -> str:
    """The first rule that fits decides; without one a failure is counted.

    https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy
    """
    for rule in policy["rules"]:
        if codes := rule.get("onExitCodes"):
            assert (codes["operator"], codes["containerName"]) == ("In", "node")
            if exit_code in codes["values"]:
                return rule["action"]
        elif disrupted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]:
            return rule["action"]
    return "Count"


@pytest.mark.parametrize("kind", MADE)
def test_a_pod_is_replaced_when_it_is_to_go_on_and_the_job_fails_when_it_would_fail_again(kind: str) -> None:
    policy = job_spec(KINDS[kind])["podFailurePolicy"]
    assert becomes_of(policy, exit_code=75) == "Ignore"
    assert becomes_of(policy, exit_code=75, disrupted=True) == "Ignore"
    assert becomes_of(policy, exit_code=137, disrupted=True) == "Ignore"
    assert becomes_of(policy, exit_code=ConfigurationError.exit_code) == "FailJob"
    assert becomes_of(policy, exit_code=LockstepError.exit_code) == "Count"
    assert becomes_of(policy, exit_code=137) == "Count"  # SIGKILL, of the memory limit for one
    assert becomes_of(policy, exit_code=143) == "Count"  # SIGTERM before Python has installed its handlers


def test_failures_are_counted_once_by_whoever_starts_the_pods_anew() -> None:
    plain, of_jobset = job_spec(KINDS["job"]), job_spec(KINDS["jobset"])
    assert (plain["backoffLimitPerIndex"], plain["maxFailedIndexes"], "backoffLimit" in plain) == (20, 0, False)
    assert (of_jobset["backoffLimit"], "backoffLimitPerIndex" in of_jobset) == (0, False)
    policy = documents(KINDS["jobset"])["JobSet"]["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 20
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]


@pytest.mark.parametrize("kind", MADE)
def test_a_pod_has_time_to_save_and_does_not_meet_its_successor(kind: str) -> None:
    assert pod_spec(KINDS[kind])["terminationGracePeriodSeconds"] >= 2 * job().grace_seconds
    assert job_spec(KINDS[kind])["podReplacementPolicy"] == "Failed"
    assert pod_spec(KINDS[kind])["restartPolicy"] == "Never"
    assert "command" not in container(KINDS[kind])  # the image's first process, which passes SIGTERM on, stays


def test_pods_find_the_first_one_by_a_name_that_dns_knows_before_it_is_ready() -> None:
    service, spec = documents(KINDS["job"])["Service"], pod_spec(KINDS["job"])
    args = container(KINDS["job"])["args"]
    host, subdomain = args[args.index("--main-address") + 1].split(".")
    # A pod of an Indexed Job is called JOB-INDEX, and found as that under its subdomain, a headless Service that selects it.
    assert host == f"{documents(KINDS['job'])['Job']['metadata']['name']}-0"
    assert subdomain == spec["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    labels = job_spec(KINDS["job"])["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()

    network = documents(KINDS["jobset"])["JobSet"]["spec"]["network"]
    args = container(KINDS["jobset"])["args"]
    # JOBSET-REPLICATED-JOB-POD.SUBDOMAIN
    assert args[args.index("--main-address") + 1] == f"digits-node-0-0.{network['subdomain']}"
    assert network["publishNotReadyAddresses"] is network["enableDNSHostnames"] is True


@pytest.mark.parametrize("kind", MADE)
def test_the_command_of_a_pod_is_understood_by_what_it_starts(kind: str) -> None:
    args = container(KINDS[kind])["args"]
    assert args[:3] == ["python", "-m", "launch.node"]
    options = parsed(node._parser(), [filled_in(argument, {"JOB_COMPLETION_INDEX": "3"}) for argument in args[3:]])
    expected = job(**ON_CPUS) if kind == "one-machine" else job()
    assert options.config == expected.config
    assert options.overrides == expected.overrides
    assert (options.nodes, options.processes) == (expected.nodes, expected.processes_per_node)
    assert options.gpus is expected.use_gpus
    assert options.node_rank == (0 if kind == "one-machine" else 3)
    limits = container(KINDS[kind])["resources"].get("limits", {})
    assert limits.get("nvidia.com/gpu") == ("8" if expected.use_gpus else None)


# Privileges, secrets, threads


@pytest.mark.parametrize("kind", MADE)
def test_pods_meet_the_restricted_pod_security_standard(kind: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, but for hostPath volumes, which users ask for."""
    spec, only = pod_spec(KINDS[kind]), container(KINDS[kind])
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] != 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert only["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert spec["automountServiceAccountToken"] is False


def test_cores_are_shared_out_to_processes_that_see_all_of_the_machine() -> None:
    def threads(**changes: Any) -> str | None:
        text = manifests(job(**changes), pods(cpus=6))
        return {entry["name"]: entry.get("value") for entry in container(text)["env"]}.get("OMP_NUM_THREADS")

    assert threads(processes_per_node=2) == "3"
    assert threads(processes_per_node=8) == "1"
    assert threads(processes_per_node=2, environment={"OMP_NUM_THREADS": "2"}) == "2"


@settings(deadline=None)
@given(st.text(max_size=80), st.text(max_size=80))
def test_any_name_becomes_one_that_host_names_can_be_made_of(one: str, other: str) -> None:
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", object_name(one))
    assert len(f"{object_name(one)}-node-0-9999-abcde") <= 63
    assert (object_name(one) == object_name(other)) == (one == other)


def test_an_image_is_needed_by_whoever_describes_a_job_from_python() -> None:
    with pytest.raises(ConfigurationError, match="--image: is required"):
        manifests(replace(job(), image=None), pods())


if __name__ == "__main__":
    for kind, text in KINDS.items():
        (GOLDEN / f"kubernetes-{kind}.yaml").write_text(text)
