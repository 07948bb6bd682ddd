"""From a job's description to the command, script or manifest that starts it; text in, text out, and no torch."""
