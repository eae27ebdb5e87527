"""What is done to an image. Pure functions, no Ray."""

from importlib import import_module
from types import ModuleType

from raypipe import UsageError

BACKENDS = ("opencv", "torchvision")
DECODERS = ("simplejpeg", "own")
"""Who decodes JPEGs: the same for both backends, noticing damage; or what the backend's library has."""


def backend(name: str) -> ModuleType:
    """The module that executes ops: raypipe.images.opencv or raypipe.images.torchvision, imported only when asked for.

    An OpenCV actor never imports torch: that costs 2 s and 300 MB each.
    """
    if name not in BACKENDS:
        raise UsageError(f"There is no backend {name!r}. Use one of: {', '.join(BACKENDS)}.")
    return import_module(f"raypipe.images.{name}")
