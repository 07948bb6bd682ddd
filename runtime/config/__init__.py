"""The configuration: sections and their defaults, YAML files with line numbers, components by target."""
