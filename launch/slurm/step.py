"""Place of a machine in a Slurm step, so that ``srun --nodes 2 lockstep doctor CONFIG`` needs no node rank and no address.

Otherwise each task would act as the only machine: two runs would train side by side, or the doctor would check each machine
alone.
"""

from __future__ import annotations

import subprocess

from launch.node_rendezvous import NodeInfo
from launch.slurm.variables import SlurmStep
from runtime.errors import ConfigurationError, Problem, SchedulerError

_TIMEOUT_SECONDS = 60


def place_in_step(step: SlurmStep, *, processes: int, port: int | None) -> NodeInfo | None:
    """Return this machine's place; None if the step has only one task.

    Args:
        processes: processes on each machine.
        port: port on the first machine. Default: derived from the job id, so that jobs on one node do not collide.

    Raises:
        ConfigurationError: the step has several tasks on a machine.
        SchedulerError: Slurm does not give the first machine's address.
    """
    if step.tasks == 1:
        return None
    if step.tasks != step.nodes:
        what = (
            f"started {step.tasks} tasks on {step.nodes} machine(s), but one task must start all processes of a machine: "
            "give srun --ntasks-per-node=1, and --processes N here"
        )
        raise ConfigurationError([Problem("command line", "srun", what)])
    return NodeInfo(step.nodes, step.node_rank, _address(step.node_list), port or 10000 + step.job % 20000, processes)


def _address(node_list: str) -> str:
    """Return the first node's address as Slurm reaches it; a name may resolve to loopback."""
    first = _scontrol("show", "hostnames", node_list).split()[0]
    node = _scontrol("-o", "show", "node", first)
    return next((word.partition("=")[2] for word in node.split() if word.startswith("NodeAddr=")), first)


def _scontrol(*words: str) -> str:
    advice = "give --nodes, --node-rank and --main-address"
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerError(
            f"this is a Slurm step, and scontrol cannot be run to find its first node ({error}): {advice}"
        ) from error
    if done.returncode or not done.stdout.split():
        raise SchedulerError(
            f"scontrol {' '.join(words)} does not give the first node of this step: {done.stderr.strip()}: {advice}"
        )
    return done.stdout
