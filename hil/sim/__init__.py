"""Simulated load and tiers around the daemon's own pipeline, in virtual time."""
