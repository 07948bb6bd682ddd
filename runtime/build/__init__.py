"""Builds a run's objects from its configuration."""
