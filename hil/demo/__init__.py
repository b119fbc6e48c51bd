"""The demonstration: a whole gateway at work on this machine, with three outages."""
