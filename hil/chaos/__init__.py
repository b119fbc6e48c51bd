"""Real processes under a seeded schedule of faults, and a ledger that must balance at the end."""
