"""The configuration: its sections with every default, files with lines, components by target."""
