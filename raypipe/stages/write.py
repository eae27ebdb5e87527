"""The write stage: one block of pixels in; its files and its journal entry out."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.journal import Dropped, Entry, Rejected, Unread, Written, put_entry
from raypipe.data.location import Location
from raypipe.data.sinks import Sink, write_shard
from raypipe.data.tables import DONE
from raypipe.images import backend as backend_module
from raypipe.images import opencv
from raypipe.images.header import UNREAD
from raypipe.images.recipe import Finish
from raypipe.stages.stage import Done


def write_block(block: pa.Table, sink: Sink, *, backend: str, finish: Finish | None) -> Entry:
    """Store the good rows of `block` (schema BLOCK), and return what was written.

    Args:
        finish: applied to stored arrays, for the format npy. None: store uint8 pixels.
    """
    if sink.format in ("jpeg", "webdataset"):
        block = _within(block, JPEG_SIDE)
    written = write_shard(
        sink,
        block,
        encode=backend_module(backend).encode,
        finish=partial(_finished, finish) if finish else None,
    )
    rows = block.select(_TOLD).to_pylist()
    good = [row for row in rows if row["reason"] is None]
    files = written.files if len(written.files) == len(good) else written.files * len(good)
    return Entry(
        epoch=rows[0]["epoch"],
        shard=rows[0]["shard"],
        written=[
            Written(
                image_id=row["image_id"],
                file=file,
                height=row["height"],
                width=row["width"],
                boxes=row["boxes"] if row["annotation_ids"] else [],
                annotation_ids=row["annotation_ids"],
                damaged=row["detail"] is not None,
                boxes_from=row["boxes_from"],
                source=[row["source_height"], row["source_width"]] if row["annotation_ids"] else [],
                orientation=row["orientation"] or 1,
            )
            for row, file in zip(good, files, strict=True)
        ],
        rejected=rejected_of(rows),
        unread=unread_of(rows),
        dropped=dropped_of(rows),
        files=written.files,
        bytes=written.bytes,
    )


FILE_COPIES = {"webdataset": 1, "parquet": 3}
"""Peak memory of making the file of a shard, as a multiple of the shard's pixels. Measured with
61 MB of pixels: 162 MB for Parquet, 10 MB for a tar of JPEGs."""

JPEG_SIDE = 65_500
"""Largest side, in pixels, of an image that libjpeg encodes (JPEG_MAX_DIMENSION)."""


def _within(block: pa.Table, side: int) -> pa.Table:
    """Reject the images of `block` with a side above `side`."""
    longest = pc.max_element_wise(block.column("height"), block.column("width"))
    if (pc.max(longest).as_py() or 0) <= side:
        return block
    long = pc.fill_null(pc.greater(longest, side), False)
    for name, value in (
        ("image", None),
        ("reason", "too many pixels"),
        ("detail", f"a JPEG has at most {side} pixels a side"),
    ):
        column = block.column_names.index(name)
        values = pc.if_else(
            long, pa.scalar(value, block.schema.field(name).type), block.column(name)
        )
        block = block.set_column(column, block.schema.field(name), values)
    return block


_TOLD = [
    "epoch",
    "shard",
    "image_id",
    "uri",
    "height",
    "width",
    "source_height",
    "source_width",
    "reason",
    "detail",
    "boxes",
    "annotation_ids",
    "orientation",
    "boxes_from",
    "boxes_dropped",
]


def rejected_of(rows: Iterable[dict[str, Any]]) -> list[Rejected]:
    """The rows that are rejected, and why."""
    return [
        Rejected(
            image_id=row["image_id"],
            uri=row["uri"],
            reason=row["reason"],
            detail=row["detail"] or "",
        )
        for row in rows
        if row["reason"] not in (None, UNREAD)
    ]


def unread_of(rows: Iterable[dict[str, Any]]) -> list[Unread]:
    """The rows whose bytes the store did not deliver."""
    return [
        Unread(image_id=row["image_id"], uri=row["uri"], detail=row["detail"] or "")
        for row in rows
        if row["reason"] == UNREAD
    ]


def dropped_of(rows: Iterable[dict[str, Any]]) -> list[Dropped]:
    """The boxes of good rows that could not be used."""
    return [
        Dropped(image_id=row["image_id"], uri=row["uri"], **box)
        for row in rows
        for box in row["boxes_dropped"] or ()
    ]


def put_done(root: Location, entry: Entry, *, bytes_in: int) -> Done:
    """Put a shard's entry into the journal below `root`, and return its counts (schema DONE)."""
    put_entry(root, entry)
    counts = (entry.shard, entry.images, len(entry.rejected), len(entry.unread))
    block = pa.table(
        {name: [count] for name, count in zip(DONE.names, counts, strict=True)}, schema=DONE
    )
    return Done(block=block, images=entry.images, bytes_in=bytes_in, bytes_out=entry.bytes)


def _finished(finish: Finish, image: np.ndarray) -> np.ndarray:
    # OpenCV's table look-up is exact and the fastest on a CPU. Padding is for batches, not files.
    return opencv.finish(image[None], replace(finish, pad_multiple=None))[0]


@dataclass(frozen=True, kw_only=True)
class Write:
    """The step: a block of pixels (schema BLOCK) becomes files and a journal entry.

    What is left of the block is its counts (schema DONE).
    finish: as for `write_block`.
    wait_ms: milliseconds to add to each image.
    shard_pixels: bytes of the pixels of the largest shard, as far as known.
    """

    sink: Sink
    backend: str
    finish: Finish | None = None
    wait_ms: float = 0.0
    shard_pixels: int = 0

    name = "write"

    @property
    def memory(self) -> int:
        """A tar or a Parquet file of a shard is made in memory, beside the shard's pixels."""
        return FILE_COPIES.get(self.sink.format, 0) * self.shard_pixels

    @property
    def libraries(self) -> str:
        return self.backend

    def elsewhere(self, folder: Location) -> Self:
        """The same step, storing into `folder`, without `wait_ms`."""
        return replace(self, sink=replace(self.sink, root=folder), wait_ms=0.0)

    def begin(self, *, threads: int, gpu: bool = False) -> "Writer":
        return Writer(self, threads)


class Writer:
    """`Write`, begun: call it with one block at a time."""

    gpu = None

    def __init__(self, step: Write, threads: int):
        backend_module(step.backend).setup(threads)
        self._step = step

    def __call__(self, block: pa.Table) -> Done:
        step = self._step
        time.sleep(step.wait_ms / 1000 * block.num_rows)
        entry = write_block(block, step.sink, backend=step.backend, finish=step.finish)
        return put_done(step.sink.root, entry, bytes_in=block.nbytes)
