"""Checks of user code, data and hidden torch state, run once at the first start of a run."""
