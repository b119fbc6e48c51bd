"""Live connections: open, keep, reopen."""
