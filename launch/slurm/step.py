"""The place of a machine in a step of Slurm's: ``srun --nodes 2 lockstep doctor CONFIG`` needs no ranks and no address.

Each task of the step would take itself for the only machine: two runs would be trained side by side, or two single machines be
found well.
"""

from __future__ import annotations

import subprocess

from launch.node_rendezvous import NodeInfo
from launch.slurm.variables import SlurmStep
from runtime.errors import ConfigurationError, Problem, SchedulerError

_SECONDS = 60


def place_in_step(step: SlurmStep, *, processes: int, port: int | None) -> NodeInfo | None:
    """Return this machine's place; None where the step has but one task, which is on its own.

    Args:
        processes: on each machine.
        port: on the first machine. Default: from the job's id, so that two jobs on one node do not meet.

    Raises:
        ConfigurationError: the step has several tasks on a machine.
        SchedulerError: Slurm does not say where the first machine is.
    """
    if step.tasks == 1:
        return None
    if step.tasks != step.nodes:
        what = (
            f"started {step.tasks} tasks on {step.nodes} machine(s), and each would start a machine's processes: "
            "give srun --ntasks-per-node=1, and --processes N here"
        )
        raise ConfigurationError([Problem("command line", "srun", what)])
    return NodeInfo(step.nodes, step.node_rank, _address(step.node_list), port or 10000 + step.job % 20000, processes)


def _address(node_list: str) -> str:
    """Return the first node's address as Slurm itself reaches it: a name may resolve to loopback."""
    first = _scontrol("show", "hostnames", node_list).split()[0]
    said = _scontrol("-o", "show", "node", first)
    return next((word.partition("=")[2] for word in said.split() if word.startswith("NodeAddr=")), first)


def _scontrol(*words: str) -> str:
    how = "give --nodes, --node-rank and --main-address"
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerError(
            f"this is a step of srun, and scontrol cannot be asked where it began ({error}): {how}"
        ) from error
    if done.returncode or not done.stdout.split():
        raise SchedulerError(
            f"scontrol {' '.join(words)} does not say where this step began: {done.stderr.strip()}: {how}"
        )
    return done.stdout
