"""Data: the samples of each step, how they are read, split into slots and assigned to ranks."""
