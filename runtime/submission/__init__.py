"""From a command line to a job in a cluster's queue: one module for each scheduler, and what they share."""
