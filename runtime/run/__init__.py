"""Execution of a training run: build, resume, train, evaluate, save."""
