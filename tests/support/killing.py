"""An op of the user's own that kills its process at bright images, as a decoder with a bug would."""

import ctypes
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
