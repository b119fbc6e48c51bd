"""Who may ask, how often, and what is put on record."""
