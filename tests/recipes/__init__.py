"""Recipes that are followed for real: what somebody adds to Lockstep, and nothing of Lockstep changed."""
