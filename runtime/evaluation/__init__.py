"""Exact evaluation and its metrics: merged over ranks, never averaged over batches."""
