"""The job script for PBS: pure text. Lockstep's node launcher starts each machine's processes, over PBS's own pbs_tmrsh."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from launch.job import JobSpec

RUN = "LOCKSTEP_RUN"  # the variable by which the queue's jobs are known as ours: the run folder

_BODY = r"""set -uo pipefail
run=@{run}
cd -- @{working_folder} && mkdir -p -- "$run/logs" || exit 1
# How often PBS has started this job again: qstat counts the starts.
restart=$(($(qstat -f "$PBS_JOBID" | sed -n 's/^ *run_count = //p') - 1))
secrets=@{secrets_file}
variables=(@{variables} "PBS_JOBID=$PBS_JOBID" "LOCKSTEP_RESTART=$restart") # pbs_tmrsh passes on none

mapfile -t hosts < <(awk '!seen[$0]++' "$PBS_NODEFILE")
machines=()
trap 'touch -- "$run/STOP"' TERM
for rank in "${!hosts[@]}"; do
  pbs_tmrsh "${hosts[$rank]}" bash -c 'cd -- "$1" && { [ -z "$2" ] || . "$2"; } && shift 2 && exec env "$@"' node \
    "$PWD" "$secrets" "${variables[@]}" @{command} --node-rank "$rank" --main-address "${hosts[0]}" &
  machines+=($!)
done

code=0
for machine in "${machines[@]}"; do
  until wait "$machine"; status=$?; ! kill -0 "$machine" 2>/dev/null; do :; done # a signal ends `wait`, not the machine
  if [ "$status" -gt "$code" ]; then code=$status; fi
done
# 75: saved, and to go on. 1: a failure that a new start may get past.
if { [ "$code" -eq 75 ] || [ "$code" -eq 1 ]; } && [ "$restart" -lt @{max_requeues} ]; then qrerun "$PBS_JOBID"; fi
exit "$code"
"""


def script(job: JobSpec, *, python: str, queue: str | None, cpus_per_process: int, secrets_file: Path | None) -> str:
    """Return the job script.

    Args:
        job: with an absolute run folder and working folder.
        python: the interpreter on the nodes.
        queue: default: PBS's.
        secrets_file: shell file that sets the secret variables.
    """
    assert job.run_folder is not None
    command = [python, "-m", "launch.node", str(job.config), *job.overrides, "--nodes", str(job.nodes)]
    command += ["--processes", str(job.processes_per_node), *(["--gpus"] if job.use_gpus else [])]
    values = {
        "working_folder": shlex.quote(str(job.working_folder)),
        "run": shlex.quote(str(job.run_folder)),
        "secrets_file": shlex.quote(str(secrets_file)) if secrets_file is not None else "",
        "variables": shlex.join(f"{name}={value}" for name, value in job.environment.items()),
        "command": shlex.join(command),
        "max_requeues": job.max_requeues,
    }
    head = "".join(f"#PBS {line}\n" for line in _directives(job, queue, cpus_per_process))
    body = re.sub(r"@\{([a-z_]+)\}", lambda place: str(values[place[1]]), _BODY)
    return f"#!/bin/bash\n{head}{body}"


def _directives(job: JobSpec, queue: str | None, cpus_per_process: int) -> Iterator[str]:
    gpus = f":ngpus={job.processes_per_node}" if job.use_gpus else ""
    yield f"-N {re.sub('[^A-Za-z0-9_-]', '-', job.name)[:200]}"
    yield f"-l select={job.nodes}:ncpus={job.processes_per_node * cpus_per_process}{gpus}"
    yield "-l place=scatter"
    if job.time_limit_seconds is not None:
        minutes, seconds = divmod(job.time_limit_seconds, 60)
        yield f"-l walltime={minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
    if queue is not None:
        yield f"-q {queue}"
    yield f"-o {job.run_folder}/logs/"
    yield "-j oe"
    yield "-r y"
    yield f"-v {RUN}={job.run_folder}"
