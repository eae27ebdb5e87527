"""What is done, what was rejected and why. Survives the driver, the actors and, on shared storage, the nodes.

A run that writes keeps its state beside its results, in `_raypipe/`:

    lease.json               the driver that writes here now (raypipe.data.lease)
    run.json                 settings that decide the results, versions, and what the results are called
    work.parquet             the table of work: which image is in which shard
    journal/000000012.json   one entry a shard, put after the shard's files: the shard is done
    unread/000000012.json    there where the entry has rows that no store gave: the next run does them again
    rejects.parquet          image_id, uri, reason, detail: written at the end, from the journal
    report.json, report.html written last; says which shards it covers
    clearing                 there while the results are being deleted
    tmp/                     files under way; emptied when a run ends

An entry is put whole, after the files it speaks of, by the actor that wrote them. So a shard counts as
done exactly when all its files are there, whoever dies when; a shard done twice puts the same entry again.

A run first looks (`look`, which changes nothing), then claims (`claimed`, which has the lease, deletes
and writes). Names that are read from here are foreign: they are checked before a file of that name
is deleted or read.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import UsageError
from raypipe.data import lease, location
from raypipe.data.formats.parquet import read_table
from raypipe.data.names import OUTSIDE, STATE
from raypipe.data.tables import DROPPED, REJECTS, WORK
from raypipe.errors import foreign, printable


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One image that was delivered: where it is and what is left of its annotations."""

    image_id: str
    file: str
    height: int
    width: int
    boxes: list[list[float]] = field(default_factory=list)  # xyxy, pixels of the written image
    annotation_ids: list[int] = field(default_factory=list)
    damaged: bool = False  # delivered all the same (--damaged keep)
    boxes_from: str | None = None  # the frame that its boxes were drawn in (raypipe.images.frames)
    source: list[int] = field(
        default_factory=list
    )  # height and width of the upright image it was made of
    orientation: int = 1  # the EXIF number by which that was turned


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """One image that was not, and why."""

    image_id: str
    uri: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Unread:
    """One image whose bytes its store did not give in time. It is neither delivered nor rejected."""

    image_id: str
    uri: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """One box of a delivered image that could not be used, and why. `box`: xyxy, as the source has it."""

    image_id: str
    uri: str
    box: list[float]
    annotation_id: int | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One shard, done. `written` holds a row an image; `files` each file once; `unread` rows that the
    next run does again, in a shard of their own; `dropped` boxes of images that are written."""

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
        """Rows of the shard: delivered, rejected and not read."""
        return len(self.written) + len(self.rejected) + len(self.unread)


def _path(shard: int, folder: str = "journal") -> str:
    return f"{STATE}/{folder}/{shard:09d}.json"


def put_entry(root: str, entry: Entry) -> None:
    """Record `entry`: its shard is done from now on, but for its unread rows."""
    if entry.unread:  # so that no run has to read all entries to find them
        location.write(root, _path(entry.shard, "unread"), b"")
    # Not asdict: it copies every row deeply, 0.05 ms each, a tenth of what writing a small image costs.
    rows = {name: list(map(_fields, getattr(entry, name))) for name in _ROWS}
    location.write(root, _path(entry.shard), _json(_fields(entry) | rows))


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


def _shards_in(root: str, folder: str) -> set[int]:
    """The shards that have a file in `folder`, by its name alone; foreign files are passed over."""
    names = location.names(location.join(root, f"{STATE}/{folder}"))
    return {int(name.removesuffix(".json")) for name in names if _NUMBERED.fullmatch(name)}


def done_shards(root: str) -> set[int]:
    """The shards that the journal has, by the names of its entries alone."""
    return _shards_in(root, "journal")


def _all_of(values: Any, *types: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, types) for value in values)


def _entry(data: bytes) -> Entry:
    """An entry from its JSON. Raises any exception for what is none."""
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
            not _all_of(drop.box, int, float)
            or len(drop.box) != 4
            or not isinstance(drop.annotation_id, int | None)
        ):
            raise TypeError(f"a dropped box of {drop.image_id!r} is none")
    for row in entry.written:
        numbers += [row.height, row.width, row.orientation]
        texts += [row.image_id, row.file, row.boxes_from or ""]
        boxes = isinstance(row.boxes, list) and all(
            _all_of(b, int, float) and len(b) == 4 for b in row.boxes
        )
        if not boxes or not _all_of(row.annotation_ids, int) or not _all_of(row.source, int):
            raise TypeError(
                f"boxes, annotation_ids or source of {row.image_id!r} are not lists of numbers"
            )
    if not _all_of(numbers, int) or not _all_of(texts, str) or not _all_of(entry.files, str):
        raise TypeError("a field is not of its type")
    for file in (*entry.files, *(row.file for row in entry.written)):
        if OUTSIDE.search(file):
            raise ValueError(f"{file!r} is no name of a file inside the output")
    return entry


def read_entries(root: str, shards: Iterable[int]) -> Iterator[Entry]:
    """The entries of `shards`, in their order.

    Raises:
        UsageError: an entry cannot be read; entries are put whole, so something else changed it.
    """

    def read(shard: int) -> Entry:
        place = location.join(root, _path(shard))
        data = location.read(place)
        remedy = "It is unknown whether its shard is done. Delete that file to have the shard done again."
        with foreign(f"the journal entry {place}", remedy=remedy):
            return _entry(data)

    yield from _together(root, read, shards)


def unread(root: str, done: Iterable[int]) -> dict[int, list[Unread]]:
    """The rows of shards that are `done` which no store gave, by the shard in which they were tried.

    Raises:
        UsageError: an entry cannot be read.
    """
    shards = sorted(_shards_in(root, "unread") & set(done))
    return {entry.shard: entry.unread for entry in read_entries(root, shards) if entry.unread}


def _together(root: str, do: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    # Remote stores answer in tens of milliseconds: a run of 10,000 shards would take minutes one by one.
    with ThreadPoolExecutor(max_workers=16 if location.is_remote(root) else 1) as threads:
        yield from threads.map(do, items)


def _read_if_there(root: str, name: str) -> bytes | None:
    try:
        return location.read(location.join(root, f"{STATE}/{name}"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_work(root: str) -> pa.Table | None:
    """The stored table of work (schema WORK), or None for a directory that has none.

    Raises:
        UsageError: it cannot be read, or names files outside the output.
    """
    data = _read_if_there(root, "work.parquet")
    if data is None:
        return None
    remedy = "It is unknown which image is in which shard. Use another --output, or --no-resume to start again."
    what = f"{location.join(root, STATE)}/work.parquet"
    table = read_table(data, WORK, what, remedy=remedy)
    with foreign(what, remedy=remedy) as place:
        for name in ("epoch", "shard", "image_id", "name", "uri", "offset", "length"):
            place.at = ("column", name)
            if table.column(name).null_count:
                raise ValueError("it has empty cells")
        place.at = ("column", "name")
        if pc.any(pc.match_substring_regex(table.column("name"), OUTSIDE.pattern)).as_py():
            raise ValueError("a name leads out of the output")
        return table


def put_work(root: str, work: pa.Table) -> None:
    """Store the table of work, replacing what is there."""
    sink = pa.BufferOutputStream()
    pq.write_table(work, sink, compression="zstd")
    location.write(root, f"{STATE}/work.parquet", sink.getvalue())


def dropped_parquet(dropped: Iterable[Dropped]) -> pa.Buffer:
    """`dropped` as the bytes of a Parquet file (schema DROPPED), an empty one when there are none."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in dropped], schema=DROPPED), sink)
    return sink.getvalue()


def rejects_parquet(rejected: Iterable[Rejected]) -> pa.Buffer:
    """`rejected` as the bytes of a Parquet file (schema REJECTS), an empty one when there are none."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rejected], schema=REJECTS), sink)
    return sink.getvalue()


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """`settings` with nested names joined by dots, so that a difference deep in a recipe is shown alone."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, list) and any(isinstance(v, dict) for v in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differences(before: dict, now: dict) -> str:
    """What differs between two settings (JSON types), a line each, as deep as it goes; empty if nothing does."""
    before, now = _flat(before), _flat(now)
    changed = [
        name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    ]
    return "\n".join(
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in changed
    )


@dataclass(frozen=True, kw_only=True)
class Made:
    """How the results in an output are made, as run.json has it.

    results: what they are called: `{name}` stands for a row's name, `{shard}` for its shard's number
        in six digits. endings: files that a run writes when all shards are done.
    """

    settings: dict[str, Any]
    versions: dict[str, Any] = field(default_factory=dict)
    results: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()


def read_made(root: str) -> Made | None:
    """What run.json says; None where there is none.

    Raises:
        UsageError: it cannot be read.
    """
    data = _read_if_there(root, "run.json")
    if data is None:
        return None
    remedy = "It is unknown how these results were made. Use another --output, or --no-resume to start this one again."
    with foreign(f"{location.join(root, STATE)}/run.json", remedy=remedy):
        record = json.loads(data)
        settings, results, endings = (record.get(name, of()) for name, of in _PARTS.items())
        if not isinstance(settings, dict) or not _all_of(results, str) or not _all_of(endings, str):
            raise TypeError("a field is not of its type")
        return Made(settings=settings, results=tuple(results), endings=tuple(endings))


_PARTS: dict[str, type] = {"settings": dict, "results": list, "endings": list}


def put_made(root: str, made: Made) -> None:
    """Record how the results in `root` are made."""
    location.write(root, f"{STATE}/run.json", json.dumps(asdict(made), indent=2).encode())


def check_settings(root: str, settings: dict) -> bool:
    """Whether `root` holds a run already; one with the same `settings`, or it is refused.

    `settings` are those that decide the results (JSON types), not how many actors make them.

    Raises:
        UsageError: the directory was made with other settings; the message shows each difference.
    """
    made = read_made(root)
    if made is None:
        return False
    changed = differences(made.settings, settings)
    if changed:
        raise UsageError(
            f"{root} holds results made with other settings; going on would mix the two:\n{printable(changed, 2000)}\n"
            f"Use another --output, or the settings it was made with, or --no-resume to delete its results and start again."
        )
    return True


def named(results: Iterable[str], work: pa.Table) -> Iterator[str]:
    """The files that rows of `work` become, relative to the output, by what the results are called."""
    for pattern in results:
        if "{name}" in pattern:
            rows = zip(work.column("name").to_pylist(), work.column("uri").to_pylist(), strict=True)
            yield from (
                pattern.replace("{suffix}", location.suffix(uri)).replace("{name}", name)
                for name, uri in rows
            )
        else:
            shards = pc.unique(work.column("shard")).to_pylist()
            yield from (pattern.replace("{shard}", f"{shard:06d}") for shard in shards)


# --- looking, then claiming ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run finds in its output. `clearing`: all of it is to be deleted, so nothing counts.
    `waiting`: the image ids of rows of done shards that are to be tried again, by shard. `seen`: the
    `state_of` the output that this is of."""

    seen: tuple[Any, ...]

    made: Made | None = None
    work: pa.Table | None = None
    done: frozenset[int] = frozenset()
    waiting: dict[int, set[str]] = field(default_factory=dict)
    clearing: bool = False


def look(root: str, settings: dict, *, resume: bool = True) -> Found:
    """What there is in `root` to go on from. It changes nothing.

    Raises:
        UsageError: it was made with other settings, cannot be read, or another driver writes there.
    """
    lease.check(root, option="--output")
    seen = state_of(root)
    _, done, clears = seen
    if clears or not resume:
        return Found(seen=seen, clearing=True)
    if not check_settings(root, settings):
        if done:
            raise UsageError(
                f"{root} has a journal of {len(done)} shards, but no {STATE}/run.json that says how they were made. "
                f"Use another --output, or --no-resume to start this one again."
            )
        return Found(seen=seen)
    return Found(
        seen=seen,
        made=read_made(root),
        work=read_work(root),
        done=done,
        waiting={
            shard: {row.image_id for row in rows} for shard, rows in unread(root, done).items()
        },
    )


def is_clearing(root: str) -> bool:
    """Whether the deletion of the results in `root` has begun and not ended."""
    return location.exists(location.join(root, f"{STATE}/clearing"))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a run changes in its output before it begins, decided by looking.

    clears: the results that are there are deleted first. work: the table to store; None: the stored
    one stays. seen: `state_of` the output when it was looked at.
    """

    root: str
    option: str = "--output"
    clears: bool = False
    made: Made
    work: pa.Table | None
    seen: tuple[Any, ...]


def state_of(root: str) -> tuple[bytes | None, frozenset[int], bool]:
    """What tells one state of an output from another, as far as it decides what is to do: the content of
    run.json, the shards that are done, and whether it is being cleared."""
    return _read_if_there(root, "run.json"), frozenset(done_shards(root)), is_clearing(root)


@contextlib.contextmanager
def claimed(
    claim: Claim,
    *,
    run_id: str,
    tell: Callable[[str], None] = lambda line: None,
    check: Callable[[str], None] = lambda file: None,
) -> Iterator[lease.Lease]:
    """Have the output for this run alone until the end of the block, and make it ready.

    Args:
        tell: told, in a line, what takes longer.
        check: called with a file in the output before anything is deleted; raises what refuses the run.

    Raises:
        UsageError: another driver has it, it changed since it was looked at, or it cannot be written to.
    """
    with lease.hold(claim.root, run_id=run_id, option=claim.option, tell=tell) as held:
        check(location.join(claim.root, lease.FILE))
        if state_of(claim.root) != claim.seen:
            raise UsageError(
                f"{claim.root} has changed since this run looked at it: another run has written there. Nothing "
                f"was changed. Start this one again; it then goes on from what is there."
            )
        if claim.clears:
            tell(f"Deleting the results of earlier runs in {claim.root} ...")
            for line in clear(claim.root):
                tell(line)
        if claim.work is not None:
            put_work(claim.root, claim.work)
        if read_made(claim.root) != claim.made:
            put_made(claim.root, claim.made)
        yield held


_OWN = (
    "rejects.parquet",
    "boxes_dropped.parquet",
    "report.json",
    "report.html",
    "work.parquet",
    "run.json",
)
_TEMPORARY = re.compile(r"[0-9a-f]{12}-\d+-\d+")


def owned(root: str) -> tuple[list[str], list[str]]:
    """The results in `root` that are surely raypipe's, relative to it; and what is left alone and why, a line each.

    They are what the journal names, what run.json and work.parquet say of shards that were under way,
    and what a run writes at its end. Files that are damaged name nothing.
    """
    files: dict[str, None] = {}
    lines = []

    def sure(do: Callable[[], Iterable[str]]) -> None:
        try:
            files.update(dict.fromkeys(do()))
        except UsageError as error:
            lines.append(f"{error} What only it names is left alone.")

    made = None
    with contextlib.suppress(UsageError):
        made = read_made(root)
    if made is None:
        lines += [f"{location.join(root, STATE)}/run.json is damaged or missing."] * bool(
            done_shards(root)
        )
    else:
        files.update(dict.fromkeys(made.endings))
        sure(lambda: [] if (work := read_work(root)) is None else list(named(made.results, work)))
    for shard in sorted(done_shards(root)):
        sure(
            lambda shard=shard: [
                file for entry in read_entries(root, [shard]) for file in entry.files
            ]
        )  # type: ignore[misc]
    inside = functools.cache(
        lambda folder: location.contains(root, f"{folder}/file" if folder else "file")
    )
    ours: list[str] = []
    outside: list[str] = []
    for file in files:
        fine = (
            not OUTSIDE.search(file)
            and inside(file.rpartition("/")[0])
            and file.partition("/")[0] != STATE
        )
        (ours if fine else outside).append(file)
    if outside:
        lines.append(
            f"{len(outside)} names in {location.join(root, STATE)} lead out of {root}, such as {outside[0]!r}. Nothing there is deleted."
        )
    return ours, [printable(line, 1000) for line in lines]


@contextlib.contextmanager
def clearing(root: str) -> Iterator[None]:
    """Mark `root` as being cleared until the end of the block: an interruption leaves the mark, and
    whoever comes next goes on with clearing."""
    location.write(
        root, f"{STATE}/clearing", b"What is here is being deleted. The next run goes on with it.\n"
    )
    yield
    location.delete(location.join(root, f"{STATE}/clearing"))
    location.delete_empty(location.join(root, STATE))  # where no lease is in it


def clear(root: str) -> list[str]:
    """Delete the results of raypipe in `root`, and the run's state: what `--no-resume` does. Other files are left alone.

    Returns, a line each, what was left and why.
    """

    def delete(file: str) -> None:
        location.delete(location.join(root, file))

    with clearing(root):
        files, lines = owned(root)
        for _ in _together(root, delete, files):
            pass
        # Entries before run.json: what is interrupted here finds only files that are gone.
        state = [
            _path(shard, folder)
            for folder in ("journal", "unread")
            for shard in _shards_in(root, folder)
        ]
        for _ in _together(root, delete, state):
            pass
        clear_temporary(root)
        for name in _OWN:
            delete(f"{STATE}/{name}")
        for folder in ("journal", "unread"):
            location.delete_empty(location.join(root, f"{STATE}/{folder}"))
        for folder in sorted(
            {parent for file in files for parent in _parents(file)}, key=len, reverse=True
        ):
            location.delete_empty(location.join(root, folder))
    return lines


def clear_temporary(root: str) -> None:
    """Delete what killed processes had under way in `root`."""
    folder = location.join(root, f"{STATE}/tmp")
    for name in location.names(folder):
        if _TEMPORARY.fullmatch(name):
            location.delete(location.join(folder, name))
    for name in location.folders(folder):
        if name.startswith("probe-"):
            location.delete_folder(location.join(folder, name))
    location.delete_empty(folder)


def _parents(file: str) -> Iterator[str]:
    while "/" in file:
        file = file.rpartition("/")[0]
        yield file
