"""Slurm: the job script, the queue, and a rank's place in a step."""
