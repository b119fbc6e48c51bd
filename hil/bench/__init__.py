"""`edge-agent bench`: what the daemon itself costs, each figure beside its floor, measured in the same run."""
