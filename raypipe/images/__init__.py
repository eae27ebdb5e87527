"""Decoding and transforming images. Pure functions, no Ray."""

from importlib import import_module
from types import ModuleType

from raypipe.errors import UsageError

BACKENDS = ("opencv", "torchvision")
DECODERS = ("simplejpeg", "own")
"""Of JPEGs: simplejpeg for both backends, which detects damage; or the backend's own decoder."""


def backend(name: str) -> ModuleType:
    """Import a backend: the module raypipe.images.opencv or raypipe.images.torchvision.

    An OpenCV actor never imports torch, which takes 2 s and 300 MB.
    """
    if name not in BACKENDS:
        raise UsageError(f"There is no backend {name!r}. Use one of: {', '.join(BACKENDS)}.")
    return import_module(f"raypipe.images.{name}")
