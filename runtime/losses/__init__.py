"""Losses, torch's and Lockstep's own, each as a sum and a weight (its divisor)."""
