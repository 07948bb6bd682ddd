"""Evaluation and prediction apart from training, on any checkpoint."""
