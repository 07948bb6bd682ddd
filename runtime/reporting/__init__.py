"""Reporting of a run: figures, the console, trackers."""
