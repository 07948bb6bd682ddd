"""Kubernetes as a :class:`ClusterScheduler`: submission only.

``kubectl get jobs`` lists its queue. It restarts pods automatically, and passes them no job id that survives a restart.
"""

from __future__ import annotations

import argparse

from launch.cluster_scheduler import ClusterScheduler


class Kubernetes(ClusterScheduler):
    """Manifests, printed for review or applied with kubectl."""

    name = "kubernetes"
    title = "Kubernetes"
    description = (
        "Print the manifests of a run for review, or apply them with kubectl. The current folder corresponds to "
        "--workdir in the image: CONFIG and the run folder have the same path below both."
    )

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See :class:`ClusterScheduler`."""
        from launch.kubernetes.submit import add_options

        add_options(parser)

    def submit(self, options: argparse.Namespace) -> int:
        """See :class:`ClusterScheduler`."""
        from launch.kubernetes.submit import submit

        return submit(options)
