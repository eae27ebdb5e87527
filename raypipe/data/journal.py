"""What is done, what was rejected and why. Survives the driver, the actors and, on shared storage, the nodes.

A run that writes keeps its state beside its results, in `_raypipe/`:

    run.json                 settings that decide the results, and versions
    work.parquet             the table of work: which image is in which shard
    journal/000000012.json   one entry a shard, put after the shard's files: the shard is done
    rejects.parquet          image_id, uri, reason, detail: written at the end, from the journal
    tmp/                     files under way; emptied when a run starts

An entry is put whole, after the files it speaks of, by the actor that wrote them. So a shard counts as done exactly when all its
files are there, whoever dies when; a shard done twice puts the same entry again.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import UsageError
from raypipe.data import location

STATE = "_raypipe"
"""The folder of a run's own files inside its output. Sources never list it."""

REJECTS = pa.schema([(name, pa.string()) for name in ("image_id", "uri", "reason", "detail")])


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One image that was delivered: where it is and what is left of its annotations."""

    image_id: str
    file: str
    height: int
    width: int
    boxes: list[list[float]] = field(default_factory=list)  # xyxy, pixels of the written image
    annotation_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """One image that was not, and why."""

    image_id: str
    uri: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One shard, done. `written` holds a row an image; `files` each file once."""

    epoch: int
    shard: int
    written: list[Written]
    rejected: list[Rejected]
    files: list[str]
    bytes: int

    @property
    def images(self) -> int:
        """Rows accounted for: delivered and rejected."""
        return len(self.written) + len(self.rejected)


def _path(shard: int) -> str:
    return f"{STATE}/journal/{shard:09d}.json"


def put_entry(root: str, entry: Entry) -> None:
    """Record `entry`: its shard is done from now on."""
    # Not asdict: it copies every row deeply, 0.05 ms each, a tenth of what writing a small image costs.
    record = _fields(entry) | {"written": list(map(_fields, entry.written)), "rejected": list(map(_fields, entry.rejected))}
    location.write(root, _path(entry.shard), json.dumps(record, separators=(",", ":")).encode())


def _fields(of: Entry | Written | Rejected) -> dict[str, Any]:
    return {name: getattr(of, name) for name in of.__slots__}


def done_shards(root: str) -> set[int]:
    """The shards that the journal has, by the names of its entries alone."""
    names = location.names(location.join(root, f"{STATE}/journal"))
    return {int(name.removesuffix(".json")) for name in names if name.endswith(".json")}


def read_entries(root: str, shards: Iterable[int]) -> Iterator[Entry]:
    """The entries of `shards`, in their order.

    Raises:
        UsageError: an entry cannot be read; entries are put whole, so something else changed it.
    """

    def read(shard: int) -> Entry:
        try:
            record = json.loads(location.read(location.join(root, _path(shard))))
            written = [Written(**row) for row in record.pop("written")]
            rejected = [Rejected(**row) for row in record.pop("rejected")]
            return Entry(**record, written=written, rejected=rejected)
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"The journal entry {location.join(root, _path(shard))} cannot be read ({error}), so it is unknown whether its shard is "
                f"done. Delete that file to have the shard done again."
            ) from error

    # Remote stores answer in tens of milliseconds: a run of 10,000 shards would take minutes one by one.
    with ThreadPoolExecutor(max_workers=16 if location.is_remote(root) else 1) as threads:
        yield from threads.map(read, shards)


def _read_if_there(root: str, name: str) -> bytes | None:
    try:
        return location.read(location.join(root, f"{STATE}/{name}"))
    except FileNotFoundError:
        return None


def read_work(root: str) -> pa.Table | None:
    """The stored table of work, or None for a directory that has none."""
    data = _read_if_there(root, "work.parquet")
    return None if data is None else pq.read_table(pa.BufferReader(data))


def put_work(root: str, work: pa.Table) -> None:
    """Store the table of work, replacing what is there."""
    sink = pa.BufferOutputStream()
    pq.write_table(work, sink, compression="zstd")
    location.write(root, f"{STATE}/work.parquet", sink.getvalue())


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
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    return "\n".join(f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in changed)


def check_settings(root: str, settings: dict) -> bool:
    """Whether `root` holds a run already; one with the same `settings`, or it is refused.

    `settings` are those that decide the results (JSON types), not how many actors make them.

    Raises:
        UsageError: the directory was made with other settings; the message shows each difference.
    """
    data = _read_if_there(root, "run.json")
    if data is None:
        return False
    try:
        before = json.loads(data)["settings"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{location.join(root, STATE)}/run.json cannot be read, so it is unknown how these results were made. Use another --output, or "
            f"--no-resume to start this one again."
        ) from None
    changed = differences(before, settings)
    if changed:
        raise UsageError(
            f"{root} holds results made with other settings; going on would mix the two:\n{changed}\n"
            f"Use another --output, or the settings it was made with, or --no-resume to delete its results and start again."
        )
    return True


def check_writable(root: str, *, option: str = "--output") -> None:
    """Write and delete a file in `root`, which the user gave as `option`.

    Raises:
        UsageError: that does not work.
    """
    try:
        location.write(root, f"{STATE}/probe", b"")
        location.delete(location.join(root, f"{STATE}/probe"))
    except location.ERRORS as error:
        raise UsageError(
            f"{option} {root!r} cannot be written to ({error}). Nothing was started. Give a folder that can."
        ) from error


def put_settings(root: str, settings: dict, versions: dict, *, endings: Iterable[str] = ()) -> None:
    """Record how the results in `root` are made. `endings`: files that the run writes when its shards are done, which no entry names."""
    record = {"settings": settings, "versions": versions, "endings": list(endings)}
    location.write(root, f"{STATE}/run.json", json.dumps(record, indent=2).encode())


def endings(root: str) -> set[str]:
    """The files in `root` that its run writes when its shards are done, by run.json; none where that cannot be read."""
    try:
        return set(json.loads(_read_if_there(root, "run.json") or b"{}").get("endings", ()))
    except (ValueError, AttributeError, TypeError):  # damaged: what is not known to be ours is the user's
        return set()


def clear(root: str) -> None:
    """Delete the results that the journal and run.json name, and the run's state: what `--no-resume` does. Other files are left alone."""
    for file in endings(root):
        location.delete(location.join(root, file))
    for entry in read_entries(root, sorted(done_shards(root))):
        for file in entry.files:
            location.delete(location.join(root, file))
    location.delete_folder(location.join(root, STATE))
