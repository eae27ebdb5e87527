"""What a run finds in its output, and what it changes there before it begins.

First `look`, which changes nothing; then `claimed`, which takes the lease, deletes and writes.
Names that are read from an output are foreign: they are checked before such a file is deleted.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data import lease, parts
from raypipe.data.journal import (
    all_of,
    done_shards,
    entry_path,
    put_work,
    read_entries,
    read_if_there,
    read_work,
    shards_in,
    together,
    unread,
)
from raypipe.data.location import Location
from raypipe.data.names import OUTSIDE, STATE
from raypipe.errors import UsageError, foreign, printable
from raypipe.images.header import NO_ROOM

# --- run.json --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Made:
    """How the results in an output are made, as run.json has it.

    Attributes:
        settings: those that decide the results (JSON types).
        results: how results are called. `{name}` stands for a row's name, `{shard}` for its shard's
            number in six digits, `{suffix}` for its source's suffix.
        endings: files that a run writes when all shards are done.
    """

    settings: dict[str, Any]
    versions: dict[str, Any] = field(default_factory=dict)
    results: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()


def read_made(root: Location) -> Made | None:
    """The content of run.json; None if there is none.

    Raises:
        UsageError: it cannot be read.
    """
    return _made(root, read_if_there(root, "run.json"))


def _made(root: Location, data: bytes | None) -> Made | None:
    if data is None:
        return None
    remedy = (
        "It is unknown how these results were made. Use another --output, or --no-resume to start "
        "this one again."
    )
    with foreign(str(root / f"{root.state}/run.json"), remedy=remedy):
        record = json.loads(data)
        settings, results, endings = (record.get(name, of()) for name, of in _PARTS.items())
        if not isinstance(settings, dict) or not all_of(results, str) or not all_of(endings, str):
            raise TypeError("a field is not of its type")
        return Made(settings=settings, results=tuple(results), endings=tuple(endings))


_PARTS: dict[str, type] = {"settings": dict, "results": list, "endings": list}


def put_made(root: Location, made: Made) -> None:
    """Record how the results in `root` are made."""
    root.write(f"{root.state}/run.json", json.dumps(asdict(made), indent=2).encode())


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two settings (JSON types), a line each; empty if there are none."""
    before, now = _flat(before), _flat(now)
    changed = [
        name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    ]
    return "\n".join(
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in changed
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with their names joined by dots, to show a difference in a recipe alone."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, list) and any(isinstance(v, dict) for v in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def check_settings(root: Location, settings: dict[str, Any]) -> bool:
    """Whether `root` already holds a run with the same `settings`.

    Args:
        settings: those that decide the results (JSON types), not how many actors make them.

    Raises:
        UsageError: the run there has other settings; the message has each difference.
    """
    made = read_made(root)
    _check(root, made, settings)
    return made is not None


def _check(root: Location, made: Made | None, settings: dict[str, Any]) -> None:
    changed = differences(made.settings, settings) if made is not None else ""
    if changed:
        raise UsageError(
            f"{root} holds results made with other settings; going on would mix the two:\n"
            f"{printable(changed, 2000)}\n"
            "Use another --output, or the settings it was made with, or --no-resume to delete its "
            "results and start again."
        )


# --- looking ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What decides the work left in an output. Two runs that see the same state plan the same.

    Attributes:
        run_json: the content of run.json; None if there is none.
        done: the shards that are done.
        clearing: the results are being deleted.
    """

    run_json: bytes | None
    done: frozenset[int]
    clearing: bool


def state_of(root: Location) -> State:
    """The state of an output now."""
    return State(read_if_there(root, "run.json"), frozenset(done_shards(root)), is_clearing(root))


def is_clearing(root: Location, mark: str = "clearing") -> bool:
    """Whether a deletion in `root` has begun and not ended. `mark`: as for `clearing`."""
    return (root / f"{root.state}/{mark}").exists()


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run finds in its output.

    Attributes:
        seen: the state of the output that was looked at.
        done: shards that are done.
        waiting: the image ids of unread rows of done shards, by shard. They are tried again.
        tight: shards in which some of these had no room in an actor's memory.
        clearing: all of it is to be deleted, so nothing counts.
    """

    seen: State
    made: Made | None = None
    work: pa.Table | None = None
    done: frozenset[int] = frozenset()
    waiting: dict[int, set[str]] = field(default_factory=dict)
    tight: frozenset[int] = frozenset()
    clearing: bool = False


def look(root: Location, settings: dict[str, Any], *, resume: bool = True) -> Found:
    """What there is in `root` to go on from. It changes nothing.

    Raises:
        UsageError: it was made with other settings, cannot be read, or is being written.
    """
    lease.check(root, option="--output")
    seen = state_of(root)
    if seen.clearing or not resume:
        return Found(seen=seen, clearing=True)
    made = _made(root, seen.run_json)
    _check(root, made, settings)
    if made is None:
        if seen.done:
            raise UsageError(
                f"{root} has a journal of {len(seen.done)} shards, but no "
                f"{root.state}/run.json that says how they were made. Use another --output, or "
                "--no-resume to start this one again."
            )
        return Found(seen=seen)
    work, waiting = read_work(root), unread(root, seen.done)
    return Found(
        seen=seen,
        made=made,
        work=work,
        done=seen.done,
        waiting={shard: {row.image_id for row in rows} for shard, rows in waiting.items()},
        tight=frozenset(
            shard for shard, rows in waiting.items() if any(row.detail == NO_ROOM for row in rows)
        ),
    )


# --- claiming --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a run changes in its output before it begins, decided by looking.

    Attributes:
        option: the flag by which the user gave `root`.
        clears: delete the results that are there.
        work: the table to store; None: the stored one stays.
        seen: the state of the output that was looked at.
        table: that the run's part divides; None: it is no part.
    """

    root: Location
    option: str = "--output"
    table: parts.Table | None = None
    clears: bool = False
    made: Made
    work: pa.Table | None
    seen: State


@contextlib.contextmanager
def claimed(
    claim: Claim,
    *,
    run_id: str,
    tell: Callable[[str], None] = lambda line: None,
    check: Callable[[Location], None] = lambda file: None,
) -> Iterator[lease.Lease]:
    """Hold the output for this run alone until the end of the block, and make it ready.

    Args:
        tell: called with a line when something takes longer.
        check: called with a file in the output before anything is deleted. It may refuse the run.

    Raises:
        UsageError: another driver has it, it changed since the look, or it cannot be written to.
    """
    root = claim.root
    with lease.hold(root, run_id=run_id, option=claim.option, tell=tell) as held:
        check(root / lease.file_of(root))
        if state_of(root) != claim.seen:
            raise UsageError(
                f"{root} has changed since this run looked at it: another run has written there. "
                "Nothing was changed. Start this one again; it then goes on from what is there."
            )
        if claim.clears:
            tell(f"Deleting the results of earlier runs in {root} ...")
            for line in clear(root):
                tell(line)
        if claim.table is not None:
            parts.settle(root, claim.table, alone=parts.is_alone(root))
        if claim.work is not None:
            put_work(root, claim.work)
        if (None if claim.clears else _made(root, claim.seen.run_json)) != claim.made:
            put_made(root, claim.made)
        yield held


# --- which results are ours ------------------------------------------------------------------


def named(results: Iterable[str], work: pa.Table) -> Iterator[str]:
    """The files that rows of `work` become, relative to the output, by `Made.results`."""
    for pattern in results:
        if "{name}" in pattern:
            rows = zip(work.column("name").to_pylist(), work.column("uri").to_pylist(), strict=True)
            yield from (
                pattern.replace("{suffix}", Location.of(uri).suffix).replace("{name}", name)
                for name, uri in rows
            )
        else:
            shards = pc.unique(work.column("shard")).to_pylist()
            yield from (pattern.replace("{shard}", f"{shard:06d}") for shard in shards)


def owned(root: Location) -> tuple[list[str], list[str]]:
    """The results in `root` that are surely raypipe's, and a line for each thing left alone.

    These are the files that the journal names, that rows become by run.json and work.parquet, and
    that a run writes at its end. Damaged files name nothing. Results are relative to `root`.
    """
    files: dict[str, None] = {}
    lines = []

    def add(found: Callable[[], Iterable[str]]) -> None:
        try:
            files.update(dict.fromkeys(found()))
        except UsageError as error:
            lines.append(f"{error} What only it names is left alone.")

    made = None
    with contextlib.suppress(UsageError):
        made = read_made(root)
    done = sorted(done_shards(root))
    if made is not None:
        files.update(dict.fromkeys(made.endings))
        add(functools.partial(_of_work, root, made))
    elif done:
        lines.append(f"{root / root.state}/run.json is damaged or missing.")
    for shard in done:
        add(functools.partial(_of_entry, root, shard))
    ours, outside = _inside(root, files)
    if outside:
        lines.append(
            f"{len(outside)} names in {root / root.state} lead out of {root}, such as "
            f"{outside[0]!r}. Nothing there is deleted."
        )
    return ours, [printable(line, 1000) for line in lines]


def _of_work(root: Location, made: Made) -> list[str]:
    work = read_work(root)
    return [] if work is None else list(named(made.results, work))


def _of_entry(root: Location, shard: int) -> list[str]:
    return [file for entry in read_entries(root, [shard]) for file in entry.files]


def _inside(root: Location, files: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files that are below `root` and outside its state folder, and the others."""
    within = functools.cache(lambda folder: root.contains(f"{folder}/file" if folder else "file"))
    ours: list[str] = []
    outside: list[str] = []
    for file in files:
        fine = (
            not OUTSIDE.search(file)
            and within(file.rpartition("/")[0])
            and file.partition("/")[0] != STATE
        )
        (ours if fine else outside).append(file)
    return ours, outside


# --- deleting them ---------------------------------------------------------------------------

_OWN = (
    "rejects.parquet",
    "boxes_dropped.parquet",
    "report.json",
    "report.html",
    "work.parquet",
    "run.json",
)
_TEMPORARY = re.compile(r"[0-9a-f]{12}-\d+-\d+")


@contextlib.contextmanager
def clearing(root: Location, mark: str = "clearing") -> Iterator[None]:
    """Mark `root` as being cleared until the end of the block.

    An interruption leaves the mark, and the next run goes on with clearing.

    Args:
        mark: tells what is being deleted: a job must not take the mark of another kind for its own.
    """
    root.write(
        f"{root.state}/{mark}", b"What is here is being deleted. The next run goes on with it.\n"
    )
    yield
    (root / f"{root.state}/{mark}").delete()
    (root / root.state).delete_empty()  # if no lease is in it


def clear(root: Location) -> list[str]:
    """Delete raypipe's results in `root` and the run's state, as `--no-resume` does.

    Other files are left alone.

    Returns:
        A line for each thing that was left, with the reason.
    """

    def delete(file: str) -> None:
        (root / file).delete()

    with clearing(root):
        files, lines = owned(root)
        for _ in together(root, delete, files):
            pass
        # Entries before run.json: after an interruption, they only name files that are gone.
        state = [
            entry_path(root, shard, folder)
            for folder in ("journal", "unread")
            for shard in shards_in(root, folder)
        ]
        for _ in together(root, delete, state):
            pass
        clear_temporary(root)
        for name in _OWN:
            delete(f"{root.state}/{name}")
        for folder in ("journal", "unread"):
            (root / f"{root.state}/{folder}").delete_empty()
        emptied = {parent for file in files for parent in _parents(file)}
        for folder in sorted(emptied, key=len, reverse=True):
            (root / folder).delete_empty()
    return lines


def clear_temporary(root: Location) -> None:
    """Delete the unfinished files of killed processes in `root`."""
    folder = root / f"{root.state}/tmp"
    for name in folder.names():
        if _TEMPORARY.fullmatch(name):
            (folder / name).delete()
    for name in folder.folders():
        if name.startswith("probe-"):
            (folder / name).delete_folder()
    folder.delete_empty()


def _parents(file: str) -> Iterator[str]:
    while "/" in file:
        file = file.rpartition("/")[0]
        yield file
