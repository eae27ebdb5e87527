"""Opening a foreign Parquet file: its column of images and its row groups, with plain types only.

A foreign file never decides what runs. Arrow keeps the writer's schema in the footer, and builds
extension types from it; Ray's would unpickle values. So that schema is hidden from Arrow.
"""

import base64
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.data.formats.columns import image_column, shape_of
from raypipe.data.location import Location

RAW = {b"raypipe.image": b"HWC RGB uint8"}
"""Schema metadata of a file whose images are raw pixels. Other files are examined row by row."""

LARGE_GROUP = 128 << 20
"""A row group above this many bytes is read in pieces of `_PIECE` bytes."""

_PIECE = 8 << 20
_MOST_ROWS = 1 << 16  # of a piece


def open_plain(source: pa.NativeFile, *, streamed: bool) -> pq.ParquetFile:
    """`source` with plain types only.

    streamed: read pages when they are needed, instead of a whole column of a row group.
    """
    metadata = _metadata(source)
    return pq.ParquetFile(
        source, metadata=metadata, buffer_size=(8 << 20) * streamed, pre_buffer=not streamed
    )


_SCHEMA, _HIDDEN = b"ARROW:schema", b"ARROW.schema"
_EXTENSION, _NAME = b"ARROW:extension:name", b"ARROW.extension.name"


def _metadata(source: pa.NativeFile) -> pq.FileMetaData:
    """The footer, with Arrow's own schema renamed to `_HIDDEN`, which Arrow does not know."""
    size = source.size()
    tail = source.read_at(min(size, 64 << 10), max(0, size - (64 << 10)))
    length = int.from_bytes(tail[-8:-4], "little")
    if size < 12 or tail[-4:] != b"PAR1" or length > size - 12:
        raise ValueError(f"{size} bytes that do not end as a Parquet file does")
    footer = (
        tail[-8 - length : -8]
        if length + 8 <= len(tail)
        else source.read_at(length, size - 8 - length)
    )
    renamed = b"PAR1" + footer.replace(_SCHEMA, _HIDDEN) + tail[-8:]
    return pq.ParquetFile(pa.BufferReader(renamed)).metadata


def _extensions(metadata: pq.FileMetaData) -> dict[str, tuple[str, bytes]]:
    """The extension type of each column, and its parameters, by the column's name."""
    kept = (metadata.metadata or {}).get(_HIDDEN)
    if kept is None:
        return {}
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(kept).replace(_EXTENSION, _NAME)))
        named = {
            column.name: column.metadata
            for column in schema
            if column.metadata and _NAME in column.metadata
        }
        return {
            name: (of[_NAME].decode(), of.get(b"ARROW:extension:metadata", b""))
            for name, of in named.items()
        }
    except Exception:  # foreign bytes; columns have their plain types
        return {}


@dataclass(frozen=True, slots=True)
class Images:
    """An open file with images.

    Attributes:
        column: the one with the images.
        shape: of every image, if they are tensors of one shape.
        raw: the images are raw pixels, because raypipe wrote them.
        ends: the number of rows up to the end of each row group.
        bytes: of each row group.
        promised: the number of rows, by the footer.
    """

    file: pq.ParquetFile
    column: str
    shape: tuple[int, ...] | None
    raw: bool
    ends: list[int]
    bytes: list[int]
    promised: int


def images_in(place: Location, *, patient: bool = False) -> Images:
    """Open a file.

    Args:
        patient: reads are repeated while the store fails.

    Raises:
        UsageError: it has no column of images.
        Exception: one of ERRORS if it cannot be read, or anything if it is damaged.
    """
    source = place.open(patient=patient)
    file = open_plain(source, streamed=False)
    metadata, schema = file.metadata, file.schema_arrow
    extensions = _extensions(metadata)
    column = image_column(schema, str(place), extensions)
    counts, sizes = [], []
    # Not row_group().column(): without the column's metadata, it ends the process (pyarrow 26).
    for group in range(metadata.num_row_groups):
        of = metadata.row_group(group)
        counts.append(of.num_rows)
        sizes.append(max(of.total_byte_size, source.size() // metadata.num_row_groups))
        if not 0 <= of.num_rows < 2**31:
            raise ValueError(f"row group {group} says that it has {of.num_rows} rows")
    if max(sizes, default=0) > LARGE_GROUP:
        file = open_plain(source, streamed=True)
    ends = list(itertools.accumulate(counts)) or [0]
    shape = shape_of(*extensions.get(column, ("", b"")))
    return Images(
        file=file,
        column=column,
        shape=shape,
        raw=RAW.items() <= (schema.metadata or {}).items(),
        ends=ends,
        bytes=sizes,
        promised=max(metadata.num_rows, ends[-1]),
    )


def pieces(file: pq.ParquetFile, group: int, columns: list[str], size: int) -> Iterator[pa.Table]:
    """The rows of a row group of `size` bytes; in one piece if it is small."""
    if size <= LARGE_GROUP:
        yield file.read_row_group(group, columns=columns, use_threads=False)
        return
    each = max(1, size // max(1, file.metadata.row_group(group).num_rows))
    batch = min(max(1, _PIECE // each), _MOST_ROWS)
    for rows_ in file.iter_batches(
        batch_size=batch, row_groups=[group], columns=columns, use_threads=False
    ):
        yield pa.table(rows_)
