"""Types, errors, time and documents. Imports nothing else of ours."""
