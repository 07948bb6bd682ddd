"""Kubernetes, as Lockstep asks it: for submission alone.

``kubectl get jobs`` is its queue. It starts pods again by itself, and tells them no id of the job that survives that.
"""

from __future__ import annotations

import argparse

from launch.cluster_scheduler import ClusterScheduler


class Kubernetes(ClusterScheduler):
    """Manifests to review, or for kubectl."""

    name = "kubernetes"
    title = "Kubernetes"
    description = (
        "Print the manifests of a run for review, or hand them to kubectl. The folder that this is called in "
        "stands for --workdir in the image: CONFIG and the run folder are below both under the same path."
    )

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See :class:`ClusterScheduler`."""
        from launch.kubernetes.submit import add_options

        add_options(parser)

    def submit(self, options: argparse.Namespace) -> int:
        """See :class:`ClusterScheduler`."""
        from launch.kubernetes.submit import submit

        return submit(options)
