"""Tensors and files that hold state: shards, layouts in memory, durable writes."""
