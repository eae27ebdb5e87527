"""Parquet files: which images one holds, and their bytes by row number, in bounded memory.

Images are encoded bytes (also Hugging Face's struct of bytes and path), raw pixels with columns `height` and `width`, or
tensors: nested lists as Hugging Face writes them, Ray's tensors and Arrow's.

A foreign file never decides what runs. Arrow keeps the writer's schema in the footer, and builds extension types from it:
those that Ray registers unpickle their values. So that schema is hidden from Arrow, and columns have plain types.
"""

import base64
import bisect
import itertools
import logging
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe.data.formats.columns import depth, image_column, is_list, is_shaped, pixels, shape_of
from raypipe.data.formats.files import npy
from raypipe.data.location import (
    ERRORS,
    Ranges,
    filesystem,
    is_remote,
    local_path,
    local_uri,
    may_pass,
    object_store,
)
from raypipe.data.tables import ANNOTATION_FIELDS, Listed, lists_of, rows
from raypipe.errors import UsageError, foreign, words
from raypipe.images.decode import Reject

log = logging.getLogger(__name__)

RAW = {b"raypipe.image": b"HWC RGB uint8"}
"""Schema metadata of a Parquet file whose images are raw pixels; others are looked at row by row."""

LARGE_GROUP = 128 << 20
"""Bytes of a row group above which it is read in pieces of `_PIECE` bytes instead of whole."""

_PIECE = 8 << 20
_MOST_ROWS = 1 << 16  # of a piece
_ANNOTATED_ROWS = 1 << 13  # whose annotations are read together
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\x93NUMPY")
_WITH_IMAGE = (
    "image_id",
    "name",
    "boxes",
    "labels",
    "crowds",
    "annotation_ids",
    "label",
    "height",
    "width",
)


# --- opening -------------------------------------------------------------------------------------------------------------


def read_table(data: bytes, schema: pa.Schema, what: str, *, remedy: str) -> pa.Table:
    """A small Parquet file that raypipe once wrote, as a table of `schema`; columns that it lacks are empty lists or zeros.

    Raises UsageError, with `what` and `remedy` (`foreign`), for anything else.
    """
    with foreign(what, remedy=remedy):
        table = _open(pa.BufferReader(data), streamed=False).read(use_threads=False)
        table.validate(full=True)
        columns = []
        for column in schema:
            if column.name in table.column_names:
                columns.append(table[column.name].cast(column.type))
            elif (
                column.name == "frame"
            ):  # of a table of work that was written before frames were known
                columns.append(rows(*[[""] * table.num_rows] * 3)["frame"])
            elif column.name == "orientation":  # likewise, of predictions
                columns.append(pa.nulls(table.num_rows, column.type))
            else:
                raise ValueError(f"it has no column {column.name!r}")
        return pa.table(columns, schema=schema)


def _open(source: pa.NativeFile, *, streamed: bool) -> pq.ParquetFile:
    """`source` with plain types only. `streamed`: pages are read when they are needed, not a whole column of a group."""
    metadata = _metadata(source)
    return pq.ParquetFile(
        source, metadata=metadata, buffer_size=(8 << 20) * streamed, pre_buffer=not streamed
    )


_SCHEMA, _HIDDEN = b"ARROW:schema", b"ARROW.schema"
_EXTENSION, _NAME = b"ARROW:extension:name", b"ARROW.extension.name"


def _metadata(source: pa.NativeFile) -> pq.FileMetaData:
    """The footer, with Arrow's own schema under a name (`_HIDDEN`) that Arrow does not know."""
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
    """The extension type that the writer gave a column, and its parameters, by the column's name."""
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
class _Images:
    """An open file: its column of images, the shape of each where it is a tensor of one shape, and where its groups end."""

    file: pq.ParquetFile
    column: str
    shape: tuple[int, ...] | None
    ends: list[int]
    bytes: list[int]  # of each group
    promised: int  # rows, by the footer


def _images_in(uri: str) -> _Images:
    """Opens a file. Raises UsageError if it has no column of images, one of ERRORS, or anything for a damaged file."""
    source = _source(uri)
    file = _open(source, streamed=False)
    metadata, schema = file.metadata, file.schema_arrow
    extensions = _extensions(metadata)
    column = image_column(schema, uri, extensions)
    counts, sizes = [], []
    # Not row_group().column(): where the footer has no metadata of a column, that ends the process (pyarrow 26).
    for group in range(metadata.num_row_groups):
        of = metadata.row_group(group)
        counts.append(of.num_rows)
        sizes.append(max(of.total_byte_size, source.size() // metadata.num_row_groups))
        if not 0 <= of.num_rows < 2**31:
            raise ValueError(f"row group {group} says that it has {of.num_rows} rows")
    if max(sizes, default=0) > LARGE_GROUP:
        file = _open(source, streamed=True)
    ends = list(itertools.accumulate(counts)) or [0]
    shape = shape_of(*extensions.get(column, ("", b"")))
    return _Images(file, column, shape, ends, sizes, max(metadata.num_rows, ends[-1]))


def _source(uri: str) -> pa.NativeFile:
    if not is_remote(uri):
        return pa.OSFile(local_path(uri))
    if object_store(uri) is not None:  # whose client says how many bytes came
        return pa.PythonFile(Ranges(uri), mode="r")
    system, path = filesystem(uri)
    return system.open_input_file(path)


def _pieces(file: pq.ParquetFile, group: int, columns: list[str], size: int) -> Iterator[pa.Table]:
    """The rows of a group of `size` bytes: in one piece if it is small."""
    if size <= LARGE_GROUP:
        yield file.read_row_group(group, columns=columns, use_threads=False)
        return
    each = max(1, size // max(1, file.metadata.row_group(group).num_rows))
    batch = min(max(1, _PIECE // each), _MOST_ROWS)
    for rows_ in file.iter_batches(
        batch_size=batch, row_groups=[group], columns=columns, use_threads=False
    ):
        yield pa.table(rows_)


# --- listing -----------------------------------------------------------------------------------------------------------------


def list_parquet(uri: str, relative: str, limit: int | None) -> Listed:
    """Rows of a file. `name`, `boxes` (xyxy), `labels`, `crowds`, `annotation_ids`, `label`, `height` and `width` are taken along if they fit.

    Raises UsageError if it is no Parquet file, or has no images.
    """
    with foreign(f"the Parquet file {uri!r}", remedy="Remove it or write it again.") as place:
        place.at = "its footer"
        images = _images_in(uri)
        count = _counted(images, uri) if limit is None else min(limit, _counted(images, uri))
        if max(images.bytes, default=0) > LARGE_GROUP:
            log.warning(
                "%s has row groups of up to %.1f GB, so they are read in pieces. Where rows are wanted in random order, as in training, "
                "smaller row groups are much faster",
                uri,
                max(images.bytes) / 1e9,
            )
        table = _annotated(images, count, place)
        unfit = [name for name in table.column_names if _column(table, name, _TYPES[name]) is None]
        if unfit:
            log.warning(
                "%s: the columns %s are of types that annotations do not have; they are ignored",
                uri,
                ", ".join(unfit),
            )
        place.at = "its annotations"
        stem = posixpath.splitext(relative)[0]
        own_ids, own_names = (_column(table, name, pa.string()) for name in ("image_id", "name"))
        numbered = [f"{stem}/{row:06d}" for row in range(count)]
        return Listed(
            rows(
                _filled(own_ids, [f"{relative}#{row}" for row in range(count)]),
                _filled(own_names if own_names is not None else own_ids, numbered),
                [local_uri(uri)] * count,
                np.arange(count),
                1,
                frames=_frames(table),
                **_annotations(uri, table),
            )
        )


_TYPES = {
    **{field.name: field.type for field in ANNOTATION_FIELDS},
    "image_id": pa.string(),
    "name": pa.string(),
    "label": pa.int64(),
    "height": pa.int32(),
    "width": pa.int32(),
}


def _counted(images: _Images, uri: str) -> int:
    """How many rows there are. A footer that says more than there can be is not believed: then they are counted."""
    if images.promised <= max(1024, sum(images.bytes)):
        return images.promised
    groups = range(len(images.bytes))
    there = sum(
        piece.num_rows
        for g in groups
        for piece in _pieces(images.file, g, [images.column], LARGE_GROUP + 1)
    )
    log.warning(
        "%s promises %d rows in %d bytes; it has %d", uri, images.promised, sum(images.bytes), there
    )
    return there


def _annotated(images: _Images, count: int, place: Any) -> pa.Table:
    """The columns of the first `count` rows that annotate images. Rows that the footer promises and the file has not are null."""
    wanted = [
        name
        for name in _WITH_IMAGE
        if name in images.file.schema_arrow.names and name != images.column
    ]
    parts: list[pa.Table] = []
    done = 0
    for group, end in enumerate(images.ends[: len(images.bytes)]):
        if done >= count or not wanted:
            break
        place.at = ("row group", group)
        batches = images.file.iter_batches(
            batch_size=_ANNOTATED_ROWS, row_groups=[group], columns=wanted, use_threads=False
        )
        stop = min(end, count)
        for batch in batches:
            parts.append(pa.table(batch).slice(0, stop - done))
            done += parts[-1].num_rows
        if done < stop:
            parts.append(_nulls(images.file, wanted, stop - done))
            done = stop
    if wanted and done < count:
        parts.append(_nulls(images.file, wanted, count - done))
    return pa.concat_tables(parts) if parts else pa.table({})


def _nulls(file: pq.ParquetFile, columns: list[str], count: int) -> pa.Table:
    of = [file.schema_arrow.field(name).type for name in columns]
    return pa.table([pa.nulls(count, type) for type in of], names=columns)


def _column(table: pa.Table, name: str, type: pa.DataType) -> pa.Array | None:
    """The column as `type`, without null lists; None if there is none or a foreign one happens to have its name."""
    if name not in table.column_names:
        return None
    try:
        values = table[name].cast(type).combine_chunks()
    except ERRORS:
        return None
    return (
        pc.coalesce(values, pa.scalar([], type))
        if pa.types.is_list(type) and values.null_count
        else values
    )


def _filled(values: pa.Array | None, defaults: list[str]) -> list[str]:
    if values is None:
        return defaults
    return [value or default for value, default in zip(values.to_pylist(), defaults, strict=True)]


def _frames(table: pa.Table) -> np.ndarray | None:
    """Height and width of each image, int32 (n, 2), where the table says so; 0, 0 where it does not."""
    sides = [
        side
        for name in ("height", "width")
        if (side := _column(table, name, pa.int32())) is not None
    ]
    if len(sides) < 2:
        return None
    frames = np.stack([side.fill_null(0).to_numpy(zero_copy_only=False) for side in sides], axis=1)
    return np.where((frames > 0).all(axis=1, keepdims=True), frames, 0)


def _annotations(uri: str, table: pa.Table) -> dict[str, pa.Array | None]:
    boxes, labels, crowds, annotation_ids = (
        _column(table, field.name, field.type) for field in ANNOTATION_FIELDS
    )
    if labels is None and (label := _column(table, "label", pa.int64())) is not None:
        labels = lists_of(
            label.is_valid().cast(pa.int64()).to_numpy(zero_copy_only=False), label.drop_null()
        )
    if boxes is None:
        return {"labels": labels}
    counts = boxes.value_lengths().to_numpy(zero_copy_only=False)
    found = (
        np.zeros_like(counts)
        if labels is None
        else labels.value_lengths().to_numpy(zero_copy_only=False)
    )
    if (wrong := np.flatnonzero((counts > 0) & (counts != found))).size:
        row = wrong[0]
        raise UsageError(
            f"{uri!r}: row {row} has {counts[row]} boxes, but {found[row]} labels ({wrong.size} rows are like that); it is not "
            "clear what is in which box. Write as many `labels` as `boxes`, or rename the column `boxes`"
        )
    if crowds is None or not crowds.value_lengths().equals(boxes.value_lengths()):
        crowds = lists_of(counts, np.zeros(counts.sum(), bool))
    if annotation_ids is None or not annotation_ids.value_lengths().equals(boxes.value_lengths()):
        annotation_ids = lists_of(counts, np.arange(counts.sum()))
    return {"boxes": boxes, "labels": labels, "crowds": crowds, "annotation_ids": annotation_ids}


# --- reading ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Window:
    """The piece of a row group that was read last: rows from `start` on, and what comes after it."""

    uri: str
    group: int
    start: int
    piece: pa.Table
    rest: Iterator[pa.Table]


class ParquetReader:
    """Rows of Parquet files by number. Keeps the last piece: rows in order decode a group once, shuffled ones once a row."""

    def __init__(self) -> None:
        self._lock = (
            threading.Lock()
        )  # threads that want the same row group wait for the one that reads it
        self._files: OrderedDict[str, _Images] = OrderedDict()
        self._window: _Window | None = None

    def close(self) -> None:
        with self._lock:
            self._window = None
            for images in self._files.values():
                images.file.close()
            self._files.clear()

    def read(self, uri: str, rows: list[int], *, most: int) -> list[bytes | Reject]:
        """The first of the rows, at least one: it stops when it has read more than `most` bytes.

        Raises one of ERRORS where a store or a disk fails; whatever is wrong with the file is a Reject of its rows.
        """
        out: list[bytes | Reject] = []
        size = 0
        with self._lock:
            try:
                images = self._opened(uri)
            except Exception as error:
                if _is_stores(error, uri):
                    raise
                return [Reject("unreadable", f"{uri}: {words(error)}")] * len(rows)
            if rows != sorted(rows) and max(images.bytes, default=0) > LARGE_GROUP:
                found = {
                    row: self._row(uri, images, row) for row in sorted(set(rows))
                }  # one pass over the group, not one a row
                return [found[row] for row in rows]
            for row in rows:
                try:
                    found_one = self._row(uri, images, row)
                except ERRORS:
                    if not out:
                        raise
                    break  # the next call begins with it
                out.append(found_one)
                size += len(found_one) if isinstance(found_one, bytes) else 0
                if size > most:
                    break
        return out

    def _opened(self, uri: str) -> _Images:
        if uri not in self._files:
            self._files[uri] = _images_in(uri)
            if len(self._files) > 16:
                self._files.popitem(last=False)[1].file.close()
        self._files.move_to_end(uri)
        return self._files[uri]

    def _row(self, uri: str, images: _Images, row: int) -> bytes | Reject:
        if not 0 <= row < images.ends[-1]:
            return Reject(
                "unreadable", f"{uri}: row {row}, but its row groups have {images.ends[-1]}"
            )
        group = bisect.bisect_right(images.ends, row)
        at = row - (images.ends[group - 1] if group else 0)
        try:
            window = self._at(uri, images, group, at)
            if window is None:
                return Reject(
                    "unreadable",
                    f"{uri}: row {row}: its row group {group} has fewer rows than the footer says",
                )
            return _bytes_in(f"{uri} row {row}", window.piece, images, at - window.start)
        except Exception as error:  # foreign bytes
            self._window = None
            if _is_stores(error, uri):
                raise  # it may be the store, which will be asked again
            return Reject("unreadable", f"{uri}: row group {group}: {words(error)}")

    def _at(self, uri: str, images: _Images, group: int, at: int) -> _Window | None:
        """The piece with row `at` of a group; None if the group has none."""
        window = self._window
        if window is None or (window.uri, window.group) != (uri, group) or at < window.start:
            self._window = None  # not two in memory
            names = images.file.schema_arrow.names
            columns = list(
                dict.fromkeys(
                    [images.column, *(name for name in ("height", "width") if name in names)]
                )
            )
            pieces = _pieces(images.file, group, columns, images.bytes[group])
            first = next(pieces, None)
            if first is None:
                return None
            window = self._window = _Window(uri, group, 0, first, pieces)
        while at >= window.start + window.piece.num_rows:
            start = window.start + window.piece.num_rows
            window.piece = window.piece.slice(0, 0)  # freed before the next one is read
            piece = next(window.rest, None)
            if piece is None:
                self._window = None
                return None
            window.start, window.piece = start, piece
        return window


def _is_stores(error: BaseException, uri: str) -> bool:
    """Whether an error is one of a store, or that there is no file, and says nothing of the file's content."""
    return isinstance(error, FileNotFoundError | PermissionError) or may_pass(error, uri)


def _bytes_in(where: str, table: pa.Table, images: _Images, row: int) -> bytes | Reject:
    column = table[images.column].slice(row, 1)
    type = column.type
    if is_list(type) or is_shaped(type):
        if not column[0].is_valid:
            return _nothing(where)
        values = column.combine_chunks()
        if is_list(type):
            return pixels(where, values, images.shape or _said(table, row, depth(type)))
        return pixels(where, values.field("data"), tuple(values.field("shape")[0].as_py() or ()))
    value = column[0].as_py()
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            return Reject("unreadable", f"{where}: holds no bytes, only the path {value['path']!r}")
        value = value["bytes"]
    if value is None:
        return _nothing(where)
    if not value:
        return Reject("empty", f"{where}: zero bytes")
    height, width = _sides(table, row)
    # A thumbnail's PNG may have just this length by chance, and raw pixels the first bytes of a JPEG: our own files are marked.
    fits = isinstance(height, int) and isinstance(width, int) and len(value) == height * width * 3
    if fits and (
        RAW.items() <= (images.file.schema_arrow.metadata or {}).items()
        or not value.startswith(_MAGIC)
    ):
        return npy(np.frombuffer(value, np.uint8).reshape(height, width, 3))
    return value


def _nothing(where: str) -> Reject:
    return Reject("empty", f"{where}: no bytes")


def _sides(table: pa.Table, row: int) -> tuple[Any, Any]:
    if not {"height", "width"} <= {*table.column_names}:
        return None, None
    return table["height"][row].as_py(), table["width"][row].as_py()


def _said(table: pa.Table, row: int, depth: int) -> tuple[int, ...] | None:
    """The shape by the columns `height` and `width`, for flat lists of pixels."""
    height, width = _sides(table, row)
    return (
        (height, width, -1)
        if depth == 1 and isinstance(height, int) and isinstance(width, int)
        else None
    )


# --- how large images are, without reading them ---------------------------------------------------------------------------


def sizes(uri: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What a file tells of its images' sizes without reading them.

    Returns:
        Bytes of each row's image, the mean of its row group: float64 (n,). And where columns say so,
        each image's height and width in pixels: int64 (n, 2), 0 where there is none.

    Raises what reading a damaged file raises.
    """
    images = _images_in(uri)
    if images.promised > max(1024, sum(images.bytes)):
        raise ValueError(f"its footer promises {images.promised} rows")
    counts = np.diff([0, *images.ends])[: len(images.bytes)]
    each = np.repeat(np.array(images.bytes, np.float64) / np.maximum(counts, 1), counts)
    if not {"height", "width"} <= set(images.file.schema_arrow.names):
        return each, None
    table = images.file.read(columns=["height", "width"], use_threads=False)
    sides = [
        pc.fill_null(pc.cast(table.column(name), pa.int64()), 0).to_numpy()
        for name in ("height", "width")
    ]
    return each, np.stack(sides, axis=1)
