"""Evaluation and prediction from a checkpoint, outside of a training run."""
