"""Optimizers, parameter groups, freezing, schedules and averages of the weights."""
