import argparse

from . import add_arguments, main

parser = argparse.ArgumentParser(prog="python -m hil.virtual", description="A microcontroller on a pseudo-terminal.")
add_arguments(parser)
raise SystemExit(main(parser.parse_args()))
