"""Lockstep's training runtime: one YAML file in, one exact answer out, on any number of processes."""
