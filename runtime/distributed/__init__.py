"""Communication between ranks: collectives, watchdog, stop requests, consistency checks."""
