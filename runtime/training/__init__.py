"""Components of the training loop: progress, triggers, divergence, buffers, observers."""
