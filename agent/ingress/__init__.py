"""The outside world to core types and back, nothing else."""
