"""What is done, and what was rejected and why. It outlives the driver, the actors and the nodes.

A run that writes keeps its state beside its results, in `_raypipe/`:

    lease.json               the driver that writes here now (raypipe.data.lease)
    run.json                 how the results are made and called (raypipe.data.outputs)
    work.parquet             the table of work: which image is in which shard
    journal/000000012.json   one entry a shard, put after the shard's files: the shard is done
    unread/000000012.json    the entry has rows that no store gave: the next run does them again
    rejects.parquet          image_id, uri, reason, detail: written at the end, from the journal
    report.json, report.html written last; says which shards it covers
    clearing                 exists while the results are being deleted
    tmp/                     unfinished files; emptied when a run ends

The actor that wrote a shard's files puts its entry, whole, after them. So a shard counts as done
exactly when all its files exist, whatever dies and when. Doing a shard twice puts the same entry.

Entries are read as foreign: names are checked before a file of that name is read or deleted.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe.data.formats.parquet import read_table
from raypipe.data.location import Location
from raypipe.data.names import OUTSIDE
from raypipe.data.tables import ANNOTATION_FIELDS, DROPPED, REJECTS, WORK, has_nulls
from raypipe.errors import foreign


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One image that was delivered: its file, and what is left of its annotations.

    Attributes:
        boxes: xyxy, pixels of the written image.
        damaged: delivered although it is damaged (--damaged keep).
        boxes_from: the frame that its boxes were drawn in (raypipe.images.frames).
        source: height and width of the upright original.
        orientation: the EXIF number of the original's turn.
    """

    image_id: str
    file: str
    height: int
    width: int
    boxes: list[list[float]] = field(default_factory=list)
    annotation_ids: list[int] = field(default_factory=list)
    damaged: bool = False
    boxes_from: str | None = None
    source: list[int] = field(default_factory=list)
    orientation: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """One image that was not delivered, and why."""

    image_id: str
    uri: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Unread:
    """One image whose store did not answer in time. It is neither delivered nor rejected."""

    image_id: str
    uri: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """One unusable box of a delivered image, and why. `box`: xyxy, as the source has it."""

    image_id: str
    uri: str
    box: list[float]
    annotation_id: int | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One shard that is done.

    Attributes:
        files: each file once, relative to the output.
        unread: rows that the next run does again, in a new shard.
        dropped: boxes of images in `written`.
    """

    epoch: int
    shard: int
    written: list[Written]
    rejected: list[Rejected]
    files: list[str]
    bytes: int
    unread: list[Unread] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def images(self) -> int:
        """The number of the shard's rows: delivered, rejected and unread."""
        return len(self.written) + len(self.rejected) + len(self.unread)


T = TypeVar("T")
R = TypeVar("R")


def entry_path(root: Location, shard: int, folder: str = "journal") -> str:
    """The file of a shard in a folder of the state of `root`, relative to it."""
    return f"{root.state}/{folder}/{shard:09d}.json"


def put_entry(root: Location, entry: Entry) -> None:
    """Record `entry`: its shard is done from now on, except for its unread rows."""
    if entry.unread:  # a marker, so that no run has to read all entries to find these
        root.write(entry_path(root, entry.shard, "unread"), b"")
    # Not asdict: its deep copy of a row takes 0.05 ms, a tenth of writing a small image.
    rows = {name: list(map(_fields, getattr(entry, name))) for name in _ROWS}
    root.write(entry_path(root, entry.shard), _json(_fields(entry) | rows))


_ROWS: dict[str, type] = {
    "written": Written,
    "rejected": Rejected,
    "unread": Unread,
    "dropped": Dropped,
}


def _json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def _fields(of: Entry | Written | Rejected | Unread | Dropped) -> dict[str, Any]:
    return {name: getattr(of, name) for name in of.__slots__}


_NUMBERED = re.compile(r"\d{9,18}\.json")


def shards_in(root: Location, folder: str) -> set[int]:
    """The shards that have a file in `folder`, by the files' names. Foreign files are ignored."""
    names = (root / f"{root.state}/{folder}").names()
    return {int(name.removesuffix(".json")) for name in names if _NUMBERED.fullmatch(name)}


def done_shards(root: Location) -> set[int]:
    """The shards in the journal, by the names of its entries."""
    return shards_in(root, "journal")


def all_of(values: Any, *types: type) -> bool:
    """Whether `values` is a list of values of these types."""
    return isinstance(values, list) and all(isinstance(value, types) for value in values)


def _entry(data: bytes) -> Entry:
    """An entry from its JSON. Raises any exception for anything else."""
    record = json.loads(data)
    rows: dict[str, Any] = {
        name: [of(**row) for row in record.pop(name, ())] for name, of in _ROWS.items()
    }
    entry = Entry(**record, **rows)
    numbers = [entry.epoch, entry.shard, entry.bytes]
    told: list[Rejected | Unread] = [*entry.rejected, *entry.unread]
    texts = [value for row in told for value in _fields(row).values()]
    for drop in entry.dropped:
        texts += [drop.image_id, drop.uri, drop.reason]
        if (
            not all_of(drop.box, int, float)
            or len(drop.box) != 4
            or not isinstance(drop.annotation_id, int | None)
        ):
            raise TypeError(f"a dropped box of {drop.image_id!r} is none")
    for row in entry.written:
        numbers += [row.height, row.width, row.orientation]
        texts += [row.image_id, row.file, row.boxes_from or ""]
        boxes = isinstance(row.boxes, list) and all(
            all_of(b, int, float) and len(b) == 4 for b in row.boxes
        )
        if not boxes or not all_of(row.annotation_ids, int) or not all_of(row.source, int):
            raise TypeError(
                f"boxes, annotation_ids or source of {row.image_id!r} are not lists of numbers"
            )
    if not all_of(numbers, int) or not all_of(texts, str) or not all_of(entry.files, str):
        raise TypeError("a field is not of its type")
    for file in (*entry.files, *(row.file for row in entry.written)):
        if OUTSIDE.search(file):
            raise ValueError(f"{file!r} is no name of a file inside the output")
    return entry


def read_entries(root: Location, shards: Iterable[int]) -> Iterator[Entry]:
    """The entries of `shards`, in their order.

    Raises:
        UsageError: an entry cannot be read. Entries are put whole, so something else changed it.
    """

    def read(shard: int) -> Entry:
        place = root / entry_path(root, shard)
        data = place.read()
        remedy = "It is unknown whether its shard is done. Delete that file to do the shard again."
        with foreign(f"the journal entry {place}", remedy=remedy):
            return _entry(data)

    yield from together(root, read, shards)


def unread(root: Location, done: Iterable[int]) -> dict[int, list[Unread]]:
    """The unread rows of shards that are `done`, by their shard.

    Raises:
        UsageError: an entry cannot be read.
    """
    shards = sorted(shards_in(root, "unread") & set(done))
    return {entry.shard: entry.unread for entry in read_entries(root, shards) if entry.unread}


def together(root: Location, do: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`do` of each item, in order; several at a time for a store.

    A store answers in tens of milliseconds: 10,000 shards one by one would take minutes.
    """
    with ThreadPoolExecutor(max_workers=16 if root.is_remote else 1) as threads:
        yield from threads.map(do, items)


def read_if_there(root: Location, name: str) -> bytes | None:
    """The content of the file `name` of a run's state; None if there is none."""
    try:
        return (root / f"{root.state}/{name}").read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_work(root: Location) -> pa.Table | None:
    """The stored table of work (schema WORK), or None if there is none.

    Raises:
        UsageError: it cannot be read, or names files outside the output.
    """
    data = read_if_there(root, "work.parquet")
    if data is None:
        return None
    remedy = (
        "It is unknown which image is in which shard. Use another --output, or --no-resume to "
        "start again."
    )
    what = str(root / f"{root.state}/work.parquet")
    table = read_table(data, WORK, what, remedy=remedy)
    with foreign(what, remedy=remedy) as place:
        for name in ("epoch", "shard", "image_id", "name", "uri", "offset", "length"):
            place.at = ("column", name)
            if table.column(name).null_count:
                raise ValueError("it has empty cells")
        for field in ANNOTATION_FIELDS:
            place.at = ("column", field.name)
            if has_nulls(table.column(field.name)):
                raise ValueError("a list has nulls")
        place.at = ("column", "name")
        if pc.any(pc.match_substring_regex(table.column("name"), OUTSIDE.pattern)).as_py():
            raise ValueError("a name leads out of the output")
        return table


def put_work(root: Location, work: pa.Table) -> None:
    """Store the table of work in place of the one before."""
    sink = pa.BufferOutputStream()
    pq.write_table(work, sink, compression="zstd")
    root.write(f"{root.state}/work.parquet", sink.getvalue())


def dropped_parquet(dropped: Iterable[Dropped]) -> pa.Buffer:
    """`dropped` as a Parquet file (schema DROPPED)."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in dropped], schema=DROPPED), sink)
    return sink.getvalue()


def rejects_parquet(rejected: Iterable[Rejected]) -> pa.Buffer:
    """`rejected` as a Parquet file (schema REJECTS)."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rejected], schema=REJECTS), sink)
    return sink.getvalue()
