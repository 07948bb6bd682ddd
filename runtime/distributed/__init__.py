"""What ranks do together: collectives, watching, stopping, comparing."""
