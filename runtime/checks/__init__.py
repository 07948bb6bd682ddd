"""Checks of what comes from outside (user code, data, torch's hidden state), made once when a run first starts."""
