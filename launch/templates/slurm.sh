#!/bin/bash
# A training run on @{nodes} node(s), @{processes} process(es). Made by `lockstep submit slurm`; `sbatch` of this file submits it again.
#SBATCH --job-name=@{job_name}
#SBATCH --comment=@{comment}
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=@{processes_per_node}
#SBATCH --output=@{log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@@{warning_seconds}
@{directives}# --signal: B: is this shell alone. Without it every process would get the signal, and die of it if it has just started.
set -uo pipefail

python=@{python}
run=@{run_folder}
logs="$run/logs/slurm-$SLURM_JOB_ID"
secrets=@{secrets_file}
restart=${SLURM_RESTART_COUNT:-0}
ranks="$logs/restart-$restart"
cd -- @{working_folder} && mkdir -p -- "$ranks" || exit 1
if [ "$restart" -gt @{max_requeues} ]; then # Slurm requeues by itself when a node is lost
  echo "lockstep: the job was started again $restart times, more than --max-requeues @{max_requeues}; it ends here"
  exit 1
fi

# Set by another launcher whose shell this was submitted from, these would make ranks of another job out of ours.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_CPU_BIND SLURM_MEM_BIND
unset LOCKSTEP_OUTCOME "${!ACCELERATE_@}" "${!TORCHELASTIC_@}"
@{environment}
if [ -n "$secrets" ]; then . "$secrets" || exit 1; fi

# The first node of the list runs this script and rank 0. Its address as Slurm itself reaches it: a name may resolve to loopback.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol -o show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$first}
# From the job's id, so that two jobs on one node do not meet; below the ports that systems hand out (32768 and up).
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
# What was asked for. A rank that finds itself in a world of another size refuses to train.
export LOCKSTEP_WORLD_SIZE=@{processes}
# The outcome that the run leaves bears this, so that one of an earlier start is not taken for this one's.
export LOCKSTEP_LAUNCH="$SLURM_JOB_ID-$restart"
# One process's threads: more of them than cores make a step several times slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Modules in the working folder must not shadow others.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
# srun takes no cpus-per-task from sbatch since Slurm 22.05.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

warned=
warn() {
  echo "lockstep: $1; the run is asked to save and leave"
  warned=$1
}
trap 'warn "the time limit is near"' USR1
trap 'echo "lockstep: the job is being ended or preempted"' TERM

# One task for each process and no launch agent in between: signals arrive, exit codes come back. A rank ignores USR1 until it
# has a handler of its own. Where one leaves, the others have the time to find out which one it was and to tell.
srun --nodes=@{nodes} --ntasks=@{processes} --ntasks-per-node=@{processes_per_node} --kill-on-bad-exit=0 --wait=@{wait_seconds} \
  --output="${ranks//%/%%}/rank-%t.log" @{step_options}\
  bash -c 'trap "" USR1; export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank \
  @{command} 2> >(tee -a -- "$ranks/srun.log" >&2) &
step=$!
touch -- "$ranks/rank-0.log"
tail --pid=$$ --lines=+1 --follow=name -- "$ranks/rank-0.log" 2>/dev/null &
tail=$!

# A signal ends `wait` and `sleep`, not the step. The file is touched again and again: a run that is only starting has not yet
# begun to watch it, and takes what is there for left over.
while kill -0 "$step" 2>/dev/null; do
  if [ -n "$warned" ]; then touch -- "$run/STOP"; fi
  sleep 1 & wait $!
done
wait "$step"
code=$?
sleep 1 # for the last lines
kill "$tail" 2>/dev/null

trap "" TERM USR1 # what is decided here is carried out whole
"$python" -m launch.slurm.requeue "$run" --logs "$logs" --launch "$LOCKSTEP_LAUNCH" --job "$SLURM_JOB_ID" \
  --code "$code" --warned "$warned" --max-requeues @{max_requeues}
verdict=$?
# 75: it is to go on, and stays in the queue.
if [ "$verdict" -ne 75 ] && [ -n "$secrets" ]; then rm -f -- "$secrets"; fi
exit "$verdict"
