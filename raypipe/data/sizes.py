"""The memory that rows will need in an actor, estimated before they are cut into shards.

Only for recipes whose results differ in size. Headers of local files are read (35 us a JPEG). For
remote files, an encoded byte counts as 20 bytes of pixels.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from raypipe import UsageError
from raypipe.data.formats import parquet
from raypipe.data.location import Location
from raypipe.data.names import PARQUET
from raypipe.data.work import SHARD_BYTES, Weights, shard_rows
from raypipe.images.decode import peek, read_header
from raypipe.images.header import MAX_PIXELS, Header, Reject
from raypipe.images.memory import needed
from raypipe.images.ops.op import Size
from raypipe.images.recipe import Recipe, for_evaluation

PER_ENCODED_BYTE = 20
"""Bytes of pixels counted for an encoded byte. JPEGs of quality 75 to 95 have 5 to 25."""

USUAL: Size = (480, 640)
"""The size of an image if nothing is known of it."""

_HEAD = 1 << 16
_MOST = 512 << 20


@dataclass(kw_only=True)
class Weigher:
    """Estimates what rows will need: call it with a table (columns uri, offset, length).

    Attributes:
        recipe: what is done to the rows.
        backend: "opencv" or "torchvision".
        memory: bytes that a shard may need.
        target: bytes of results at which a shard is large enough; None: only `memory` bounds it.
        largest: bytes of the largest row so far.
    """

    recipe: Recipe
    backend: str
    memory: int
    max_pixels: int
    target: int | None
    largest: int = 0

    def __call__(self, rows: pa.Table) -> Weights:
        uris, offsets, lengths = (
            rows.column(name).to_pylist() for name in ("uri", "offset", "length")
        )
        of: dict[tuple[Any, ...], tuple[int, int, int]] = {}
        weights = np.zeros((len(uris), 3), np.int64)
        for row, (encoded, header) in enumerate(
            _looked_up(uris, offsets, lengths, self.max_pixels)
        ):
            if header is None:  # it will be rejected
                continue
            key = (
                header.height,
                header.width,
                header.format,
                header.native,
                header.scans,
                header.orientation > 1,
            )
            if key not in of:
                of[key] = self._of(header)
            out, most, peak = of[key]
            weights[row] = out, most + encoded, peak
        self.largest = max(self.largest, int(weights[:, 1:].sum(axis=1).max(initial=0)))
        return Weights(
            out=weights[:, 0],
            held=weights[:, 1],
            peak=weights[:, 2],
            memory=self.memory,
            target=self.target,
        )

    def _of(self, header: Header) -> tuple[int, int, int]:
        """Bytes of a result, usually and at most; and bytes needed while it is made."""
        size = header.height, header.width
        usual = for_evaluation(self.recipe).largest(size)
        most = self.recipe.largest(size)
        reduce = self.recipe.reduce(size)
        peak = 0
        for draw in range(3 if self.recipe.random else 1):
            try:
                ops = self.recipe.plan(seed=0, epoch=draw, image_id="", size=size).ops
                peak = max(peak, needed(header, ops, self.backend, reduce=reduce))
            except Reject:
                pass
        return usual[0] * usual[1] * 3, most[0] * most[1] * 3, peak


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Shards of at most `rows` rows in `memory` bytes.

    A row's result has `each` bytes, or what `weigh` says.
    """

    rows: int
    memory: int
    each: int = 0
    weigh: Weigher | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `raypipe.data.work.make_work` and the like."""
        return {"rows_per_shard": self.rows, "weigh": self.weigh}

    @property
    def need(self) -> int:
        """Bytes that the largest shard needs, as far as rows were weighed.

        For recipes with one size, its results alone.
        """
        return (
            self.rows * self.each
            if self.weigh is None
            else min(self.memory, self.weigh.largest + 2 * SHARD_BYTES)
        )


def cut(
    recipe: Recipe,
    *,
    images: int,
    rows: int | None,
    backend: str,
    memory: int,
    max_pixels: int = MAX_PIXELS,
) -> "Cut":
    """How to cut `images` rows into shards that fit into `memory` bytes.

    Args:
        rows: at most in a shard, as the user wants it; None: those of SHARD_BYTES of results.

    Raises:
        UsageError: no result of the recipe fits.
    """
    size = recipe.fixed_size
    if size is None:
        weigh = Weigher(
            recipe=recipe,
            backend=backend,
            memory=memory,
            max_pixels=max_pixels,
            target=SHARD_BYTES if rows is None else None,
        )
        return Cut(rows=rows or shard_rows(rows=images, row_bytes=1), memory=memory, weigh=weigh)
    each = size[0] * size[1] * 3
    if each > memory // 2:
        raise UsageError(
            f"Recipe {recipe.name} makes images of {size[0]}x{size[1]}, {each / 1e9:.2f} GB each, "
            f"and an actor has {memory / 1e9:.2f} GB for results and for the image at work. Ask "
            "for more with --actor-memory, or make smaller ones."
        )
    wanted = rows or shard_rows(rows=images, row_bytes=each)
    return Cut(rows=min(wanted, memory // 2 // each), memory=memory, each=each)


def _looked_up(
    uris: Sequence[str], offsets: Sequence[int], lengths: Sequence[int], max_pixels: int
) -> Iterable[tuple[int, Header | None]]:
    """Encoded bytes and the header of each row; the header is a guess for files that are not read.

    None for a row that will be rejected.
    """
    of_parquet: dict[str, tuple[np.ndarray, np.ndarray | None] | None] = {}
    places = {uri: Location.of(uri) for uri in uris}
    remote = _remote_sizes(
        {
            uri: places[uri]
            for uri, length in zip(uris, lengths, strict=True)
            if length < 0 and places[uri].is_remote
        }
    )
    for uri, offset, length in zip(uris, offsets, lengths, strict=True):
        place = places[uri]
        if place.path.lower().endswith(PARQUET):
            if uri not in of_parquet:
                of_parquet[uri] = _of_parquet(place)
            yield _row_of(of_parquet[uri], offset)
        elif uri.startswith("demo://"):
            yield 0, _guessed(USUAL)
        elif place.is_remote:
            size = length if length >= 0 else remote.get(uri, 0)
            yield size, _of_bytes(size) if size else _guessed(USUAL)
        else:
            yield _local(place.path, offset, length, max_pixels)


def _guessed(size: Size) -> Header:
    return Header(format="jpeg", height=size[0], width=size[1], native=True, scans=True)


def _of_bytes(encoded: float) -> Header:
    """A guess of an image with so many bytes: a square."""
    side = max(1, int((encoded * PER_ENCODED_BYTE / 3) ** 0.5))
    return _guessed((side, side))


def _of_parquet(place: Location) -> tuple[np.ndarray, np.ndarray | None] | None:
    try:
        return parquet.sizes(place)
    except Exception:  # foreign bytes: the reader says what is wrong
        return None


def _row_of(sizes: tuple[np.ndarray, np.ndarray | None] | None, row: int) -> tuple[int, Header]:
    if sizes is None or not 0 <= row < len(sizes[0]):
        return 0, _guessed(USUAL)
    encoded = int(sizes[0][row])
    if sizes[1] is not None and 0 < sizes[1][row].prod() <= MAX_PIXELS:
        height, width = sizes[1][row].tolist()
        return encoded, Header(format="npy", height=height, width=width)
    return encoded, _of_bytes(encoded)


def _local(path: str, offset: int, length: int, max_pixels: int) -> tuple[int, Header | None]:
    """The encoded bytes and the header of a local file, or of a part of one."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        )
    except (OSError, ValueError):  # ValueError: no name of a file
        return 0, None
    try:
        size = length if length >= 0 else os.fstat(descriptor).st_size - offset
        head = os.pread(descriptor, min(size, _HEAD), offset)
        header = peek(head)
        if header is None and 0 < size <= _MOST:
            header = read_header(os.pread(descriptor, size, offset), max_pixels=max_pixels)
        if header is None or header.height * header.width > max_pixels:
            return 0, None
        return size, header
    except (OSError, OverflowError, Reject):
        return 0, None
    finally:
        os.close(descriptor)


def _remote_sizes(places: Mapping[str, Location]) -> dict[str, int]:
    """Bytes of each object, by listing their folders: one request for a thousand objects."""
    folders: dict[str, list[str]] = defaultdict(list)
    for uri in places:
        folders[uri.rpartition("/")[0]].append(uri)
    found: dict[str, int] = {}
    for members in folders.values():
        try:
            system, _ = places[members[0]].filesystem()
            paths = {places[uri].filesystem()[1]: uri for uri in members}
            folder = next(iter(paths)).rpartition("/")[0]
            listed = system.get_file_info(fs.FileSelector(folder))
        except Exception:  # the reader says what is wrong
            continue
        found |= {
            paths[info.path]: info.size for info in listed if info.path in paths and info.size
        }
    return found
