"""Exact evaluation: metric states are merged over ranks, never averaged over batches."""
