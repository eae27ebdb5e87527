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
        ctypes.string_at(0)  # a fault of this thread, as a decoder's; a signal may arrive too late
    return image


@dataclass(frozen=True, kw_only=True)
class WaitUntil:
    """Delay each image by `ms` until the file `there` exists: a run lasts as long as its test."""

    there: str
    ms: float = 1000.0


@opencv.apply.register
def _(op: WaitUntil, image, out=None):
    if not os.path.exists(op.there):
        time.sleep(op.ms / 1000)
    return image
