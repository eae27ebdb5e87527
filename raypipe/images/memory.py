"""How much memory an image takes while it is decoded and transformed, known before either is done.

Bytes a pixel were measured as the peak of the process (VmHWM) on pictures of 20 megapixels; those of
ops stand in the backends (`SCRATCH`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from raypipe.images.header import Header
from raypipe.images.recipe import Resize, Size, output_size

_DECODING = {
    "jpeg": 13,
    "png": 9,
    "bmp": 8,
    "gif": 8,
    "webp": 17,
    "avif": 16,
    "heif": 16,
    "tiff": 16,
    "npy": 6,
}
"""Bytes a pixel while an image of each format is decoded, the result included."""

_ONE_SCAN, _SEVERAL_SCANS = 3, 9
"""The same, of a JPEG that simplejpeg decodes: several scans need all coefficients at once."""

_TURNED = 3
UNKNOWN_OP = 30
"""Bytes a pixel that an op takes of which nothing is known: a float32 copy or two."""

MOST = 170
"""Bytes a pixel that no image takes more than, whatever is done to it: where there are so many nothing has to be added up."""


def needed(
    header: Header, ops: Sequence[Any], scratch: Mapping[type, float], *, reduce: int = 1
) -> int:
    """Bytes at most while an image is decoded and goes through plain `ops`, its encoded bytes not counted.

    Args:
        scratch: what each op of the backend takes, beside the images before and after it, in bytes a
            pixel of the larger one.
        reduce: the part of its size at which a JPEG is decoded.
    """
    pixels = header.height * header.width
    if header.native:
        decoding = (
            pixels * (_SEVERAL_SCANS - 3 if header.scans else 0) + pixels // reduce**2 * _ONE_SCAN
        )
    else:
        reduce, decoding = 1, pixels * _DECODING[header.format]
    if header.orientation > 1:
        decoding += pixels // reduce**2 * _TURNED
    size: Size = (-(-header.height // reduce), -(-header.width // reduce))
    most = float(decoding)
    for op in ops:
        after = output_size(op, size)
        before, behind = size[0] * size[1], after[0] * after[1]
        # A resize goes over rows first, and what it takes is of the size in between.
        worked_on = (
            max(after[0] * size[1], behind) if isinstance(op, Resize) else max(before, behind)
        )
        in_float = 12 * before if isinstance(op, Resize) and op.arithmetic == "float" else 0
        most = max(
            most, 3 * (before + behind) + scratch.get(type(op), UNKNOWN_OP) * worked_on + in_float
        )
        size = after
    return int(most)
