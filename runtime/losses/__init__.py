"""Losses: torch's by name and Lockstep's own, as sums and what they are divided by."""
