"""Training, export and measurement of the models in this folder.

Needs the `train` extra. Nothing that runs on a gateway imports this package.
"""
