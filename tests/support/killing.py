"""Ops of the user's own: one kills its process at bright images, one waits until a test is done."""

import ctypes
import os
import time
from dataclasses import dataclass

from raypipe.images import opencv


@dataclass(frozen=True, kw_only=True)
class DieAtBright:
    above: float = 250.0


@opencv.apply.register
def _(op: DieAtBright, image, out=None):
    if image.mean() > op.above:
        ctypes.string_at(
            0
        )  # a fault of this very thread, as a decoder's; a signal from outside may reach it too late
    return image


@dataclass(frozen=True, kw_only=True)
class WaitUntil:
    """Each image takes `ms` longer until the file `there` exists: a run lasts as long as a test needs it."""

    there: str
    ms: float = 400.0


@opencv.apply.register
def _(op: WaitUntil, image, out=None):
    if not os.path.exists(op.there):
        time.sleep(op.ms / 1000)
    return image
