"""A TIFF writer for tests: any depth, planes, tiles, byte order and predictor.

It shares no code with the readers.
"""

import struct
import zlib

import numpy as np

COMPRESSIONS = {"none": 1, "deflate": 8, "packbits": 32773}


def tiff(
    samples: np.ndarray,
    *,
    bits: int,
    photometric: int,
    planar: bool = False,
    compression: str = "none",
    tile: int | None = None,
    order: str = "<",
    predictor: bool = False,
    sample_format: int = 1,
    colours: np.ndarray | None = None,
    rows_per_strip: int = 7,
    extra: tuple[tuple[int, int, tuple[int, ...]], ...] = (),
) -> bytes:
    """A TIFF of `samples`, integers (height, width, n) of `bits` each.

    Args:
        planar: each sample in a plane of its own.
        tile: sides of square tiles; None: strips.
        predictor: horizontal differences (8 and 16 bits).
        colours: (3, 2**bits) uint16, of a palette.
        extra: more tags: number, kind (3 or 4), values.
    """
    height, width, count = samples.shape
    planes = [samples[..., k : k + 1] for k in range(count)] if planar else [samples]
    if tile is None:
        boxes = [
            (top, 0, min(rows_per_strip, height - top), width)
            for top in range(0, height, rows_per_strip)
        ]
    else:
        boxes = [
            (top, left, tile, tile)
            for top in range(0, height, tile)
            for left in range(0, width, tile)
        ]
    parts = []
    for plane in planes:
        padded = np.pad(plane, ((0, tile or 0), (0, tile or 0), (0, 0)), mode="edge")
        for top, left, rows, columns in boxes:
            part = padded[top : top + rows, left : left + columns]
            if predictor:
                part = np.diff(part.astype(np.int64), axis=1, prepend=0) % (1 << bits)
            parts.append(_packed(_bytes(part, bits, order), compression))
    tags: list[tuple[int, int, tuple[int, ...]]] = [
        *(
            (256, 4, (width,)),
            (257, 4, (height,)),
            (258, 3, (bits,) * count),
            (259, 3, (COMPRESSIONS[compression],)),
        ),
        *(
            (262, 3, (photometric,)),
            (277, 3, (count,)),
            (284, 3, (2 if planar else 1,)),
            (339, 3, (sample_format,) * count),
        ),
        *extra,
    ]
    if predictor:
        tags.append((317, 3, (2,)))
    if colours is not None:
        tags.append((320, 3, tuple(int(value) for value in colours.reshape(-1))))
    lengths = tuple(map(len, parts))
    starts = tuple(int(at) for at in 8 + np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    if tile is None:
        tags += [(273, 4, starts), (278, 4, (rows_per_strip,)), (279, 4, lengths)]
    else:
        tags += [(322, 3, (tile,)), (323, 3, (tile,)), (324, 4, starts), (325, 4, lengths)]
    return _file(b"".join(parts), sorted(tags), order)


def _bytes(part: np.ndarray, bits: int, order: str) -> bytes:
    rows = part.reshape(len(part), -1)
    if bits in (8, 16, 32):
        return rows.astype(f"{order}u{bits // 8}").tobytes()
    # Samples of other depths are packed without gaps, high bit first; rows begin at a byte.
    single = (rows[..., None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(single.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def _packed(data: bytes, compression: str) -> bytes:
    if compression == "deflate":
        return zlib.compress(data)
    if compression == "packbits":
        pieces = [data[at : at + 128] for at in range(0, len(data), 128)]
        return b"".join(bytes([len(piece) - 1]) + piece for piece in pieces)
    return data


def _file(pixels: bytes, tags: list[tuple[int, int, tuple[int, ...]]], order: str) -> bytes:
    start = 8 + len(pixels) + len(pixels) % 2
    far_at = start + 2 + 12 * len(tags) + 4
    directory, far = struct.pack(order + "H", len(tags)), b""
    for number, kind, values in tags:
        content = struct.pack(order + {3: "H", 4: "I"}[kind] * len(values), *values)
        if len(content) > 4:
            content, far = (
                struct.pack(order + "I", far_at + len(far)),
                far + content + b"\0" * (len(content) % 2),
            )
        directory += struct.pack(order + "HHI", number, kind, len(values)) + content.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + pixels + b"\0" * (len(pixels) % 2) + directory + struct.pack(order + "I", 0) + far
