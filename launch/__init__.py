"""Turn a job's description into the command, script or manifest that starts it. Imports no torch."""
