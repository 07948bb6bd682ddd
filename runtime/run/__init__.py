"""A training run from its first start to its end."""
