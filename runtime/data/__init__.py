"""Data: which samples make up a step, how they are read, cut into slots and shared out over ranks."""
