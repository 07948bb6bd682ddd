"""From the configuration to objects."""
