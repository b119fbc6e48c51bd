from platformio.public import PlatformBase


class Edge_treePlatform(PlatformBase):
    """No boards and no packages: everything comes from the tree and the system."""
