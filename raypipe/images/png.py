"""PNG: the header, and the chunks that decide about pixels.

Ancillary chunks (text, profiles, times) are removed before decoding, so that their size or checksum
never rejects a good image. The checksums of the others are verified here: Pillow and OpenCV skip
those of the pixels.
"""

import struct
import zlib
from collections.abc import Iterator

from raypipe.images.header import Header, Reject
from raypipe.images.orientation import upright

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_START = struct.Struct(">I4s")
_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_MOST_TEXT = 1 << 20
"""Bytes of a text when decompressed, at most. One with an orientation has a few hundred."""


def read(data: bytes) -> Header:
    """The header of a PNG. Raises Reject and struct.error."""
    chunks = _chunks(data)
    kind, start, length = next(chunks, (b"", 0, 0))
    if kind != b"IHDR" or length != 13 or start + length > len(data):
        raise Reject(
            "truncated" if len(data) < 33 else "corrupt",
            "it does not begin with a header of 13 bytes (IHDR)",
        )
    width, height = struct.unpack_from(">II", data, start)
    exif = raw = xmp = b""
    for kind, start, length in chunks:
        if kind == b"eXIf":
            exif = data[start : start + length]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, text = _text(kind, data[start : start + length])
            if keyword == b"Raw profile type exif":
                raw = _profile(text)
            elif keyword == b"XML:com.adobe.xmp" and kind == b"iTXt":
                xmp = text
            elif keyword == b"exif":
                exif = text
    orientation = upright(exif or raw, xmp)
    if orientation >= 5:
        width, height = height, width
    return Header(format="png", height=height, width=width, orientation=orientation)


def pixels(data: bytes, *, strict: bool) -> bytes:
    """The PNG with its pixels only: no metadata, no transparency, no animation.

    Args:
        strict: raise Reject "damaged" where a checksum is wrong.
    """
    parts = [SIGNATURE]
    for kind, start, length in _chunks(data):
        if not kind.isalpha():  # not a chunk: the decoder reports it
            parts.append(data[start - 8 :])
            break
        if kind not in _PIXELS:
            if kind[:1].isupper():
                raise Reject(
                    "unsupported mode",
                    f"its chunk {kind.decode()}, which changes what pixels mean, is unknown",
                )
            continue
        end = start + length
        if (
            strict
            and len(data) >= end + 4
            and zlib.crc32(data[start - 4 : end]).to_bytes(4, "big") != data[end : end + 4]
        ):
            raise Reject(
                "damaged", f"the checksum of its chunk {kind.decode()} at byte {start - 8} is wrong"
            )
        parts.append(data[start - 8 : end + 4])
    return b"".join(parts)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk, the position of its content, and the length that it states."""
    at, kind = len(SIGNATURE), b""
    while at + 8 <= len(data) and kind != b"IEND":
        length, kind = _START.unpack_from(data, at)
        yield kind, at + 8, length
        at += 12 + length


def _text(kind: bytes, content: bytes) -> tuple[bytes, bytes]:
    """A text chunk's keyword and text; an empty text if it cannot be read."""
    keyword, _, rest = content.partition(b"\0")
    if kind == b"tEXt":
        return keyword, rest
    if keyword not in (b"Raw profile type exif", b"XML:com.adobe.xmp", b"exif"):
        return keyword, b""
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        rest = rest[1:]
    try:
        return keyword, zlib.decompressobj().decompress(rest, _MOST_TEXT) if packed else rest
    except zlib.error:
        return keyword, b""


def _profile(text: bytes) -> bytes:
    """The bytes of ImageMagick's profile: hexadecimal, after three lines (empty, kind, length)."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""
