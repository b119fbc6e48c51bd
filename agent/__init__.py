"""edge-agent: one inference request path across a microcontroller, the gateway and the cloud."""

__version__ = "0.1.0"
