"""Which models exist, in which variants, and how accurate they prove to be."""
