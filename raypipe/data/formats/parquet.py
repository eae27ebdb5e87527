"""Parquet files: their images, read by row number in bounded memory, and how a shard becomes one.

Images are encoded bytes (also Hugging Face's struct of bytes and path), raw pixels with columns
`height` and `width`, or tensors: nested lists as Hugging Face writes them, Ray's and Arrow's.
"""

import bisect
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe.data.formats import parquetfile
from raypipe.data.formats.annotations import COLUMNS, annotations, sides
from raypipe.data.formats.columns import image_at
from raypipe.data.formats.huggingface import classes_of
from raypipe.data.formats.parquetfile import RAW, Images, images_in, open_plain, pieces
from raypipe.data.location import Location
from raypipe.data.stores import ERRORS
from raypipe.data.tables import Listed, rows
from raypipe.errors import Place, UsageError, foreign, logger, words
from raypipe.images.header import Reject

log = logger(__name__)

_ANNOTATED_ROWS = 1 << 13  # whose annotations are read together
_WITH_IMAGE = ("image_id", "name", *COLUMNS)


# --- raypipe's own small files ---------------------------------------------------------------


def read_table(data: bytes, schema: pa.Schema, what: str, *, remedy: str) -> pa.Table:
    """A small Parquet file that raypipe once wrote, as a table of `schema`.

    Columns that older versions did not write are zeros or nulls.

    Raises:
        UsageError: it is anything else; the message has `what` and `remedy` (`errors.foreign`).
    """
    with foreign(what, remedy=remedy):
        table = open_plain(pa.BufferReader(data), streamed=False).read(use_threads=False)
        table.validate(full=True)
        columns = []
        for column in schema:
            if column.name in table.column_names:
                columns.append(table[column.name].cast(column.type))
            elif column.name == "frame":  # a table of work from before frames were stored
                columns.append(rows(*[[""] * table.num_rows] * 3)["frame"])
            elif column.name == "orientation":  # the same, of predictions
                columns.append(pa.nulls(table.num_rows, column.type))
            else:
                raise ValueError(f"it has no column {column.name!r}")
        return pa.table(columns, schema=schema)


# --- listing ---------------------------------------------------------------------------------


def list_parquet(place: Location, relative: str, limit: int | None) -> Listed:
    """The images of a file, a row each, with the annotations of columns that fit.

    These are `name`, `boxes` (xyxy), `labels`, `crowds`, `annotation_ids`, `label`, `height` and
    `width`.

    Raises:
        UsageError: it is no Parquet file, has no images, or cannot be read now.
    """
    with foreign(f"the Parquet file {str(place)!r}", remedy="Remove it or write it again.") as at:
        try:
            return _listed(place, relative, limit, at)
        except Exception as error:
            if not _is_stores(error, place):
                raise
            raise UsageError(
                f"cannot read the Parquet file {str(place)!r}: {words(error)}. Nothing was "
                "started. The file may be whole: make it readable, or try again when its store "
                "answers"
            ) from error


def _listed(place: Location, relative: str, limit: int | None, at: Place) -> Listed:
    at.at = "its footer"
    images = images_in(place, patient=True)
    count = _counted(images, place) if limit is None else min(limit, _counted(images, place))
    if max(images.bytes, default=0) > parquetfile.LARGE_GROUP:
        log.warning(
            "%s has row groups of up to %.1f GB, so they are read in pieces. For rows in "
            "random order, as in training, smaller row groups are much faster",
            place,
            max(images.bytes) / 1e9,
        )
    table = _annotated(images, count, at)
    at.at = "its annotations"
    stem = posixpath.splitext(relative)[0]
    own_ids, own_names = (_texts(table, name) for name in ("image_id", "name"))
    numbered = [f"{stem}/{row:06d}" for row in range(count)]
    return Listed(
        rows(
            _filled(own_ids, [f"{relative}#{row}" for row in range(count)]),
            _filled(own_names if own_names is not None else own_ids, numbered),
            [place.uri] * count,
            np.arange(count),
            1,
            **annotations(place, table),
        ),
        classes=classes_of(images.file.schema_arrow.metadata or {}),
    )


def _counted(images: Images, place: Location) -> int:
    """The number of rows. If the footer says more than can be there, they are counted instead."""
    if images.promised <= max(1024, sum(images.bytes)):
        return images.promised
    groups = range(len(images.bytes))
    there = sum(
        piece.num_rows
        for g in groups
        for piece in pieces(images.file, g, [images.column], parquetfile.LARGE_GROUP + 1)
    )
    log.warning(
        "%s promises %d rows in %d bytes; it has %d",
        place,
        images.promised,
        sum(images.bytes),
        there,
    )
    return there


def _annotated(images: Images, count: int, at: Place) -> pa.Table:
    """The annotations of the first `count` rows. Rows that only the footer has are null."""
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
        at.at = ("row group", group)
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


def _texts(table: pa.Table, name: str) -> pa.Array | None:
    """The column as text; None if there is none that can be cast."""
    if name not in table.column_names:
        return None
    column = table[name]
    try:
        if pa.types.is_floating(column.type):  # pandas writes NaN for a null
            column = pc.if_else(pc.is_nan(column), None, column)
        return column.cast(pa.string()).combine_chunks()
    except ERRORS:
        return None


def _filled(values: pa.Array | None, defaults: list[str]) -> list[str]:
    if values is None:
        return defaults
    return [value or default for value, default in zip(values.to_pylist(), defaults, strict=True)]


# --- reading ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Window:
    """The piece of a row group that was read last: its rows from `start` on, and later pieces."""

    place: Location
    group: int
    start: int
    piece: pa.Table
    rest: Iterator[pa.Table]


class ParquetReader:
    """Reads rows of Parquet files by number. Threads may share it.

    It keeps the last piece. So rows in order decode a row group once, shuffled rows once a row.
    """

    def __init__(self) -> None:
        # Threads that want the same row group wait for the thread that reads it.
        self._lock = threading.Lock()
        self._files: OrderedDict[Location, Images] = OrderedDict()
        self._window: _Window | None = None

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._window = None
            for images in self._files.values():
                images.file.close()
            self._files.clear()

    def read(self, place: Location, rows: list[int], *, most: int) -> list[bytes | Reject]:
        """The images of the first rows, at least one: it stops after more than `most` bytes.

        A damaged file gives a Reject for each of its rows.

        Raises:
            OSError, pa.ArrowException: a store or a disk fails.
        """
        out: list[bytes | Reject] = []
        size = 0
        with self._lock:
            try:
                images = self._opened(place)
            except Exception as error:
                if _is_stores(error, place):
                    raise
                return [Reject("unreadable", f"{place}: {words(error)}")] * len(rows)
            if rows != sorted(rows) and max(images.bytes, default=0) > parquetfile.LARGE_GROUP:
                # In order, so that one pass over a row group is enough.
                found = {row: self._row(place, images, row) for row in sorted(set(rows))}
                return [found[row] for row in rows]
            for row in rows:
                try:
                    found_one = self._row(place, images, row)
                except ERRORS:
                    if not out:
                        raise
                    break  # the next call begins with it
                out.append(found_one)
                size += len(found_one) if isinstance(found_one, bytes) else 0
                if size > most:
                    break
        return out

    def _opened(self, place: Location) -> Images:
        if place not in self._files:
            self._files[place] = images_in(place)
            if len(self._files) > 16:
                self._files.popitem(last=False)[1].file.close()
        self._files.move_to_end(place)
        return self._files[place]

    def _row(self, place: Location, images: Images, row: int) -> bytes | Reject:
        if not 0 <= row < images.ends[-1]:
            return Reject(
                "unreadable", f"{place}: row {row}, but its row groups have {images.ends[-1]}"
            )
        group = bisect.bisect_right(images.ends, row)
        at = row - (images.ends[group - 1] if group else 0)
        try:
            window = self._at(place, images, group, at)
            if window is None:
                return Reject(
                    "unreadable",
                    f"{place}: row {row}: row group {group} has fewer rows than the footer says",
                )
            return image_at(
                f"{place} row {row}",
                window.piece,
                images.column,
                at - window.start,
                shape=images.shape,
                raw=images.raw,
            )
        except Exception as error:  # foreign bytes
            self._window = None
            if _is_stores(error, place):
                raise  # the store will be asked again
            return Reject("unreadable", f"{place}: row group {group}: {words(error)}")

    def _at(self, place: Location, images: Images, group: int, at: int) -> _Window | None:
        """The piece with row `at` of a group; None if the group has none."""
        window = self._window
        if window is None or (window.place, window.group) != (place, group) or at < window.start:
            self._window = None  # frees its piece before the next is read
            names = images.file.schema_arrow.names
            columns = list(
                dict.fromkeys(
                    [images.column, *(name for name in ("height", "width") if name in names)]
                )
            )
            rest = pieces(images.file, group, columns, images.bytes[group])
            first = next(rest, None)
            if first is None:
                return None
            window = self._window = _Window(place, group, 0, first, rest)
        while at >= window.start + window.piece.num_rows:
            start = window.start + window.piece.num_rows
            window.piece = window.piece.slice(0, 0)  # freed before the next one is read
            piece = next(window.rest, None)
            if piece is None:
                self._window = None
                return None
            window.start, window.piece = start, piece
        return window


def _is_stores(error: BaseException, place: Location) -> bool:
    """Whether an error is the store's, or a missing file's, and says nothing of the content."""
    return isinstance(error, FileNotFoundError | PermissionError) or place.may_pass(error)


# --- how large images are, without reading them ----------------------------------------------


def sizes(place: Location) -> tuple[np.ndarray, np.ndarray | None]:
    """The sizes of a file's images, without reading them.

    Returns:
        Bytes of each row's image, as the mean of its row group: float64 (n,). And each image's
        height and width in pixels, if columns have them: int64 (n, 2), 0 for nulls.

    Raises:
        Exception: anything, if the file is damaged.
    """
    images = images_in(place)
    if images.promised > max(1024, sum(images.bytes)):
        raise ValueError(f"its footer promises {images.promised} rows")
    counts = np.diff([0, *images.ends])[: len(images.bytes)]
    each = np.repeat(np.array(images.bytes, np.float64) / np.maximum(counts, 1), counts)
    if not {"height", "width"} <= set(images.file.schema_arrow.names):
        return each, None
    table = images.file.read(columns=["height", "width"], use_threads=False)
    return each, np.stack([sides(table.column(name)) for name in ("height", "width")], axis=1)


# --- writing ---------------------------------------------------------------------------------

_WRITTEN = (
    "image_id",
    "name",
    "height",
    "width",
    "image",
    "boxes",
    "labels",
    "crowds",
    "annotation_ids",
)
_GROUP = 8 << 20  # bytes of pixels of a row group: readers of shuffled rows decode one for each


def parquet_of(block: pa.Table) -> memoryview:
    """The good rows of a block (schema BLOCK) as a Parquet file of raw pixels."""
    if block["image"].null_count:  # else filter would copy all pixels for nothing
        block = block.filter(pc.is_valid(block["image"]))
    sink = pa.BufferOutputStream()
    pq.write_table(
        block.select(_WRITTEN).replace_schema_metadata(RAW),
        sink,
        row_group_size=max(1, _GROUP // max(1, block["image"].nbytes // block.num_rows)),
        compression="none",
        use_dictionary=False,
    )
    return memoryview(sink.getvalue())
