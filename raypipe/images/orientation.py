"""The orientation of an image by its EXIF and XMP.

The same images are turned as by PIL.ImageOps.exif_transpose, and the orientation is read from the
same places: an EXIF block, ImageMagick's "Raw profile type exif" in a PNG, and without these, XMP's
tiff:Orientation.
"""

import re
import struct

_ORIENTATION = 0x0112
_KINDS = {
    3: "H",
    4: "I",
    6: "b",
    8: "h",
    9: "i",
    11: "f",
    13: "I",
    5: "II",
    10: "ii",
    12: "d",
    16: "Q",
}
"""The struct format of each TIFF number type. Two parts are a fraction."""

_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def upright(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation, 1 to 8, from an EXIF block, else from an XMP packet, else 1."""
    found = exif_orientation(exif)
    if found is None and xmp and (match := _XMP.search(xmp)):
        found = int(match[1])
    return found if found is not None and 1 <= found <= 8 else 1


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in an EXIF block, any number; None: it has none.

    Takes 2 us. Pillow parses the whole block in 50.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    found = None
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", exif, entry)
            if tag == _ORIENTATION:
                found = _number(exif, order, entry + 8, kind, count) if count else 0
    except struct.error:
        pass
    return found


def _number(exif: bytes, order: str, at: int, kind: int, count: int) -> int:
    """The first number of an entry if it is an integer of one digit, else 0."""
    packed = order + _KINDS.get(kind, "")
    if struct.calcsize(packed) * count > 4:
        (at,) = struct.unpack_from(order + "I", exif, at)
    parts = struct.unpack_from(packed, exif, at)
    value = (
        parts[0] / parts[1] if len(parts) == 2 and parts[1] else parts[0] if len(parts) == 1 else 0
    )
    return int(value) if value == value and abs(value) < 10 and value == int(value) else 0
