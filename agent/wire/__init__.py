"""Sans-I/O codecs: bytes to frames to typed messages."""
