"""JPEG: the header, and decoding that detects damage.

libjpeg warns of damage and goes on, and most libraries drop its warnings. simplejpeg raises them
(`strict`), in the same pass. Two warnings are no damage and are ignored:

- padding before the end mark: bytes that are all 0x00, or all 0xFF;
- unknown markers that describe the file and not its pixels.

libjpeg does not report two kinds of damage, which are detected here: missing scans of a progressive
file, and zeros that were decoded as pixels before they were taken for padding.
"""

import re
import struct
from collections.abc import Iterator

import numpy as np
import simplejpeg

from raypipe.images.header import Header, Reject
from raypipe.images.orientation import upright

EOI = b"\xff\xd9"

_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">BHHB")
_SOS, _BASELINE, _PROGRESSIVE = 0xDA, (0xC0, 0xC1), 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def read(data: bytes) -> Header | None:
    """The header of a JPEG as cameras and encoders write it; None for others, which Pillow reads.

    Takes 7 us, Pillow 30: 1% of the time of a 640x480 image.
    """
    at, size, components, progressive, exif, xmp = 2, None, 0, False, b"", b""
    try:
        while True:
            mark, kind, length = _SEGMENT.unpack_from(data, at)
            if mark != 0xFF or length < 2:
                return None
            if kind == _SOS:  # after it FF is stuffed or a marker, so an EOI there is a real one
                break
            if kind == _PROGRESSIVE or kind in _BASELINE:
                if size is not None:
                    return None
                precision, height, width, components = _FRAME.unpack_from(data, at + 4)
                if precision != 8 or components not in (1, 3):
                    return None
                size, progressive = (height, width), kind == _PROGRESSIVE
            elif kind == 0xE1:
                if data.startswith(b"Exif\0\0", at + 4):  # a long block continues in the next
                    exif += data[at + 10 : at + 2 + length]
                elif data.startswith(_XMP, at + 4):
                    xmp = data[at + 4 : at + 2 + length]
            elif not (kind in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= kind <= 0xEF):
                return None
            at += 2 + length
    except struct.error:
        return None
    if size is None or data.rfind(EOI, at) < 0:
        return None
    orientation = upright(exif, xmp) if exif or xmp else 1
    height, width = size if orientation < 5 else size[::-1]
    scans = progressive or data[at + 4 : at + 5] != bytes([components])
    return Header(
        format="jpeg", height=height, width=width, orientation=orientation, native=True, scans=scans
    )


def decode(data: bytes, header: Header, reduce: int = 1, *, strict: bool = True) -> np.ndarray:
    """Decode a native JPEG, without its orientation.

    Args:
        reduce: decode at 1/`reduce` (1, 2, 4, 8) of its size, rounded up.
        strict: reject images of which libjpeg warns. Otherwise return what can be decoded.

    Returns:
        HWC RGB uint8.

    Raises:
        Reject: "damaged", with libjpeg's words; "truncated".
    """
    missing = missing_scans(data) if strict and header.scans else None
    if missing:
        raise Reject("damaged", missing)
    height, width = header.stored
    small = (
        {"min_height": -(-height // reduce), "min_width": -(-width // reduce), "min_factor": reduce}
        if reduce > 1
        else {}
    )
    for _ in range(_TRIES if strict else 1):
        try:
            return simplejpeg.decode_jpeg(data, "RGB", strict=strict, **small)
        except ValueError as error:
            words = str(error)
            cleaned = without_harmless(data, words) if strict else None
        if cleaned is None:
            break
        data = cleaned
    raise Reject(
        "truncated" if words.startswith("Premature end") else "damaged", f"libjpeg: {words}"
    )


_TRIES = 6
"""How often decoding is tried without harmless parts: libjpeg reports its last warning only."""


def damage(data: bytes, *, colours: str) -> str | None:
    """The damage that libjpeg finds in a JPEG that another decoder decodes, in words.

    None: it finds none, or cannot decode the file at all.

    Args:
        colours: what to decode to, "RGB" or "CMYK".
    """
    try:
        simplejpeg.decode_jpeg(data, colours, strict=False)
    except ValueError:
        return None
    try:
        simplejpeg.decode_jpeg(data, colours, strict=True)
    except ValueError as error:
        words = str(error)
        cleaned = without_harmless(data, words)
        return words if cleaned is None else damage(cleaned, colours=colours)
    return missing_scans(data)


_EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
_ABOUT_THE_FILE = re.compile(r"unknown JFIF revision|Unknown Adobe color transform|bad ICC marker")

_AHEAD = 16
"""Bytes of padding that libjpeg may read ahead and not count. More were decoded as pixels."""


def without_harmless(data: bytes, words: str) -> bytes | None:
    """`data` without the cause of a harmless warning; None: the warning is about pixels.

    Args:
        words: the warning.
    """
    if _ABOUT_THE_FILE.search(words):
        cleaned = _without_metadata(data)
        return cleaned if cleaned != data else None
    match = _EXTRANEOUS.fullmatch(words)
    if match is None:
        return None
    count, end = int(match[1]), _end(data)
    for unit in (b"\0", b"\xff\0"):  # a 0xFF among pixels has a zero behind it
        if not data[end - count // len(unit) * len(unit) : end].replace(unit, b""):
            start = end
            while data.endswith(unit, 0, start):
                start -= len(unit)
            return data[: end - count] + data[end:] if end - start - count <= _AHEAD else None
    return None


def _end(data: bytes) -> int:
    """The position of the end mark at which decoding ends; the length of `data` without one."""
    return next((start for kind, start in _markers(data) if kind == 0xD9), len(data))


_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """The kind and position of each marker from the first segment on; skips entropy-coded data."""
    at = 2
    while (match := _MARKER.search(data, at)) is not None:
        kind = match[1][0]
        yield kind, match.end() - 2
        at = match.end()
        if kind != 0x01:
            at += int.from_bytes(data[at : at + 2], "big")


def missing_scans(data: bytes) -> str | None:
    """The coefficients that no scan contains, in words; None: there are none.

    libjpeg does not report a progressive file that was cut between two scans and closed by an end
    mark: it decodes a blurred image.
    """
    left: dict[int, np.ndarray] = {}  # by component, the missing bits of each coefficient
    progressive = False
    for kind, start in _markers(data):
        body = data[start + 4 : start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")]
        if kind in _FRAMES and len(body) >= 6:
            progressive = kind == _PROGRESSIVE
            left = {component: np.full(64, 16, np.int8) for component in body[6::3]}
        elif kind == _SOS and body and len(body) >= 4 + 2 * body[0]:
            first, last, low = body[-3], body[-2], body[-1] & 15
            for component in body[1 : 1 + 2 * body[0] : 2]:
                if component in left:
                    left[component][slice(first, last + 1) if progressive else slice(None)] = (
                        low if progressive else 0
                    )
        elif kind == 0xD9:
            break
    for number, bits in enumerate(left.values()):
        if bits.any():
            return (
                f"scans are missing: component {number} lacks {np.count_nonzero(bits)} of its 64 "
                "coefficients, or their last bits"
            )
    return None


def _without_metadata(data: bytes) -> bytes:
    """`data` without its application segments.

    JFIF and Adobe decide about colours: they stay, with version numbers that libjpeg knows.
    """
    parts = [data[:2]]
    for kind, start in _markers(data):
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        segment = data[start : start + 2 + length]
        if kind == 0xE0 and segment[4:9] == b"JFIF\0":
            parts.append(segment[:9] + b"\1\1" + segment[11:])
        elif kind == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16:
            parts.append(segment[:15] + bytes([min(segment[15], 1)]) + segment[16:])
        elif not (0xE1 <= kind <= 0xEF or kind == 0xFE):
            parts.append(data[start:] if kind == _SOS else segment)
        if kind == _SOS:
            break
    return b"".join(parts)
