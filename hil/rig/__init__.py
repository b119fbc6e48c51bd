"""The hardware-in-the-loop rig: one suite of checks for any board (docs/hil.md)."""
