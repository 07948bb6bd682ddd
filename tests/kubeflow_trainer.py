"""What the controller of Kubeflow's Trainer makes of a TrainJob and its runtime, as its source tells (v2.3).

https://github.com/kubeflow/trainer: ``pkg/webhooks`` refuses, ``pkg/runtime/core/trainingruntime.go`` merges patches and
resources, ``pkg/runtime/framework/plugins`` (plainml, torch, jobset) fill in the rest.
"""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"

# manifests/base/runtimes/torch_distributed.yaml, as the API server completes it
TORCH_DISTRIBUTED: dict[str, Any] = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "replicas": 1,
                        "template": {
                            "metadata": {"labels": {ANCESTOR: "trainer"}},
                            "spec": {
                                "template": {
                                    "spec": {"containers": [{"name": "node", "image": "pytorch/pytorch:2.13.0"}]}
                                }
                            },
                        },
                    }
                ]
            }
        },
    },
}


def jobset_spec(trainjob: dict[str, Any], runtime: dict[str, Any]) -> dict[str, Any]:
    """Return what the JobSet is that the controller makes."""
    spec, metadata = trainjob["spec"], trainjob["metadata"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", metadata["name"])
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    assert spec["runtimeRef"] == reference
    if runtime["kind"] == "TrainingRuntime":
        assert runtime["metadata"].get("namespace") == metadata.get("namespace")
    made = deepcopy(runtime["spec"]["template"]["spec"])
    for patch in spec.get("runtimePatches", []):
        assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[\w./-]+", patch["manager"])  # IsDomainPrefixedPath
        patched = patch["trainingRuntimeSpec"]["template"]["spec"]
        for job in patched["replicatedJobs"]:
            assert "env" not in pod(job)["containers"][0]  # refused for the container ``node``
        names = {job["name"] for job in made["replicatedJobs"]}
        assert {job["name"] for job in patched["replicatedJobs"]} <= names
        made = merged(made, patched)
    trainer, policy = spec["trainer"], runtime["spec"]["mlPolicy"]
    (ours,) = [job for job in made["replicatedJobs"] if job["template"]["metadata"]["labels"][ANCESTOR] == "trainer"]
    assert ours["replicas"] == 1
    ours["template"]["spec"] |= {"completions": trainer["numNodes"], "parallelism": trainer["numNodes"]}
    (container,) = [found for found in pod(ours)["containers"] if found["name"] == "node"]
    container |= {key: trainer[key] for key in ("image", "command", "args") if key in trainer}
    container["env"] = merged(container.get("env", []), trainer.get("env", []))
    if "resourcesPerNode" in trainer:
        container["resources"] = merged(container.get("resources", {}), trainer["resourcesPerNode"])
    if "torch" in policy:
        variables = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "auto", "PET_MASTER_PORT": "29500"}
        variables["PET_MASTER_ADDR"] = f"{metadata['name']}-node-0-0.{metadata['name']}"
        added = [{"name": name, "value": value} for name, value in variables.items()]
        container["env"] = merged(container["env"], added)
    return made


def pod(replicated: dict[str, Any]) -> dict[str, Any]:
    """Return what the pods of a replicated Job are."""
    found: dict[str, Any] = replicated["template"]["spec"]["template"]["spec"]
    return found


def merged(source: Any, patch: Any) -> Any:
    """Merge as Kubernetes' strategic merge patches do: mappings by key, lists of objects by name or where they are mounted."""
    if isinstance(source, dict) and isinstance(patch, dict):
        return source | {key: merged(source[key], value) if key in source else value for key, value in patch.items()}
    if isinstance(source, list) and isinstance(patch, list) and all(isinstance(item, dict) for item in source + patch):
        by_key = {item.get("mountPath", item["name"]): item for item in source}
        for item in patch:
            key = item.get("mountPath", item["name"])
            by_key[key] = merged(by_key[key], item) if key in by_key else item
        return list(by_key.values())
    return patch
