"""The hardware-in-the-loop rig and the virtual microcontroller."""
