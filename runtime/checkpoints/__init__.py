"""What is on disk: whole checkpoints, one owner, rollbacks, resumption, exports."""
