"""Exits 0 if TensorFlow Lite Micro runs the model on standard input in an arena of argv[1] bytes.

A process of its own, because the runtime aborts when the arena is too small for its allocator.
"""

import sys

import numpy as np
from tflite_micro import runtime

interpreter = runtime.Interpreter.from_bytes(sys.stdin.buffer.read(), arena_size=int(sys.argv[1]))
details = interpreter.get_input_details(0)
interpreter.set_input(np.zeros(details["shape"], details["dtype"]), 0)
interpreter.invoke()
