"""The processes of a run: starting them, deciding together, stopping, and naming the one that fails."""
