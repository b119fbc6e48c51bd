"""Types, errors and time. Imports nothing else of ours."""
