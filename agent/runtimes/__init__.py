"""Run a model file here: used by the gateway target and by the cloud worker."""
