"""Reads the bytes of rows where they are needed, ahead of the consumer."""

import functools
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from raypipe import UsageError
from raypipe.data import demo
from raypipe.data.formats import files
from raypipe.data.formats.files import Range, unreadable
from raypipe.data.formats.parquet import ParquetReader
from raypipe.data.lead import FEW, Lead
from raypipe.data.location import Location
from raypipe.data.names import PARQUET
from raypipe.data.patience import READ_PATIENCE_S, Patience
from raypipe.data.stores import ERRORS, Store, StoreError, one_line, short
from raypipe.images.header import UNREAD, Reject

CHUNK_ROWS = 16  # at most, in one I/O thread's turn
CHUNK_BYTES = 4 << 20
HELD_BYTES = 128 << 20
"""Read at most, besides one image, until missing files are tried once more."""

AHEAD_BYTES = 128 << 20
"""Bytes that one call of `Reader.read` reads ahead from a store. Larger images wait their turn."""

AGAIN_AFTER_S = 2.0
"""Then missing files are read once more: a network file system may show a new file late."""

_WORTH_S = 1e-4  # of waiting a row justify a thread: decoding 90 kB takes 1.5 ms
_GAP = 64 << 10  # bytes between two ranges that are cheaper to read than another request


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How an actor reads: the arguments of its Reader."""

    threads: int = 1
    patience_s: float = READ_PATIENCE_S
    root: str | None = None

    def reader(self) -> "Reader":
        """A reader with these arguments."""
        return Reader(self.threads, patience_s=self.patience_s, root=self.root)


class Reader:
    """Fetches the bytes of rows ahead of their consumer, in I/O threads.

    - 0 threads: in the caller's thread, not ahead.
    - 1 thread: in the caller's thread while reading never waits, because the files are in memory;
      else ahead.
    - more: ahead. Of a store, as many requests at the same time as hide the latency that was
      measured; at most a request a thread (`Lead`).

    A JPEG of 90 kB that the system has in memory costs 22 us by open().read(). Reading it here
    costs 26 us in the caller's thread, and 30 to 50 us ahead. Decoding it costs 1550 us. If all
    cores are busy, switching threads costs as much again (2% of the images/s of two actors on two
    cores).

    It holds at most 2 * threads + 1 chunks of 16 rows or 4 MiB, and the image that exceeds them;
    from a missing file on, also HELD_BYTES. Of a store's objects it holds AHEAD_BYTES in all, and
    the image in turn. One reader may serve many calls of `read`, also at the same time.
    """

    def __init__(
        self, threads: int = 4, *, patience_s: float = READ_PATIENCE_S, root: str | None = None
    ) -> None:
        """
        Args:
            threads: I/O threads.
            patience_s: seconds for which a store that does not answer is asked again.
            root: the local folder that the rows were listed in, if it is one.
        """
        if threads < 0:
            raise UsageError(f"{threads} reader threads are not possible; give 0 or more")
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "raypipe-read") if threads else None
        self._parquet = ParquetReader()
        self._lead = Lead(threads)
        self._far = False  # the last read in the caller's thread had to wait
        self._patience_s = patience_s
        self._root = root
        self._stores: dict[Store | None, Patience] = {}
        self._away = Patience(patience_s)  # with a root of which nothing can be read

    def close(self) -> None:
        """End the threads. Reads in progress are finished, others are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._parquet.close()

    def read(self, rows: pa.Table) -> Iterator[bytes | Reject]:
        """The bytes of each row in order, or why they cannot be had. Raises nothing for a row.

        Raw pixels in Parquet come as the bytes of a .npy file. If a store does not answer in time,
        the reason is UNREAD, which says nothing of the row. Missing and forbidden files are tried
        once more, together. If nothing at all can be read, the store has failed.

        Args:
            rows: with SOURCE's columns `uri`, `offset` and `length`.
        """
        places: dict[str, Location] = {}  # rows of one tar or Parquet file share theirs
        ranges = [
            Range(places.get(uri) or places.setdefault(uri, Location.of(uri)), offset, length)
            for uri, offset, length in zip(
                rows["uri"].to_pylist(),
                rows["offset"].to_pylist(),
                rows["length"].to_pylist(),
                strict=True,
            )
        ]
        return self._settled(ranges, self._ahead(ranges))

    def _settled(
        self, ranges: list[Range], found: Iterator[bytes | Reject]
    ) -> Iterator[bytes | Reject]:
        """`found`, with missing files tried once more.

        From the first missing one on, HELD_BYTES are read before any is given.
        """
        nothing, row = True, 0
        for one in found:
            count, settled = 1, iter((one,))
            if isinstance(one, _Missing):
                batch = _held(one, found)
                count = len(batch)
                settled = self._again(ranges[row : row + count], batch, nothing=nothing)
                del batch  # which gives its images away one by one
            row += count
            for result in settled:
                if nothing and not isinstance(result, Reject):
                    nothing = False
                    self._away.succeeded()
                yield result

    def _again(
        self, ranges: list[Range], found: list[bytes | Reject], *, nothing: bool
    ) -> Iterator[bytes | Reject]:
        missing = [row for row, one in enumerate(found) if isinstance(one, _Missing)]
        if self._patience_s:
            time.sleep(min(AGAIN_AFTER_S, self._patience_s))
        pauses = 0
        while True:
            for row in missing:
                (found[row],) = self._read([ranges[row]])
            missing = [row for row, one in enumerate(found) if isinstance(one, _Missing)]
            nothing = nothing and all(isinstance(one, Reject) for one in found) and len(found) > 1
            if not missing or not (nothing or self._root_is_away()):
                self._away.succeeded()
                break
            # Not the store's patience: that a file is missing is an answer, which resets it.
            pause = self._away.failed(found[missing[0]].detail, pauses)  # type: ignore[union-attr]
            if pause is None:
                for row in missing:
                    found[row] = Reject(UNREAD, found[row].short)  # type: ignore[union-attr]
                break
            pauses += 1
            time.sleep(pause)
        for row in missing:
            if isinstance(one := found[row], _Missing):
                found[row] = unreadable(one.detail)
        found.reverse()
        while found:
            yield found.pop()

    def _root_is_away(self) -> bool:
        """Whether the folder of the rows is missing, or empty like a mount point."""
        if self._root is None:
            return False
        try:
            with os.scandir(self._root) as entries:
                return next(entries, None) is None
        except OSError:
            return True

    def _patience(self, place: Location) -> Patience:
        found = self._stores.get(place.store)
        return found or self._stores.setdefault(place.store, Patience(self._patience_s))

    def _ahead(self, ranges: list[Range]) -> Iterator[bytes | Reject]:
        todo = deque(_chunks(ranges, self._threads))
        local = not ranges or not ranges[0].place.is_remote
        near = self._threads == 0 or (self._threads == 1 and _TELLS and local)
        while todo and near:
            chunk = todo.popleft()
            if self._far and len(chunk) > 1:  # one row tells whether reading still waits
                todo.appendleft(chunk[1:])
                chunk = chunk[:1]
            before = _off_s()
            done = self._read(chunk)
            if self._threads:
                self._far = _off_s() - before > _WORTH_S * len(done)
                near = not self._far
            if len(done) < len(chunk):
                todo.appendleft(chunk[len(done) :])
            yield from done
        if self._pool is None:
            return
        pool = self._pool
        flying: deque[tuple[list[Range], bool, Future[list[bytes | Reject]]]] = deque()
        ahead = _Ahead()

        def submit() -> None:
            chunk = todo.popleft()
            read = functools.partial(self._read, chunk, ahead)
            flying.append((chunk, True, pool.submit(self._lead.request, read)))

        def at_once() -> int:
            return ahead.at_once(2 * self._threads if local else self._lead.requests)

        try:
            while todo or flying:
                while todo and len(flying) < at_once():
                    submit()
                chunk, counted, future = flying.popleft()
                done = future.result()
                given = time.perf_counter()
                if len(done) < len(chunk):  # it stopped at its limit of bytes
                    rest = chunk[len(done) :]  # in turn now, so read whatever its size
                    flying.appendleft((rest, False, pool.submit(self._read, rest)))
                elif todo and len(flying) < at_once():
                    submit()
                del future
                done.reverse()
                while done:
                    if counted and isinstance(done[-1], bytes):
                        ahead.hold(-len(done[-1]))
                    yield done.pop()
                self._lead.consumed(time.perf_counter() - given)
        finally:
            for _, _, future in flying:
                future.cancel()

    def _read(self, ranges: list[Range], ahead: "_Ahead | None" = None) -> list[bytes | Reject]:
        """The first of the ranges: it stops after more than a chunk's bytes.

        Args:
            ahead: what is read ahead; it stops before an image that has no room there, perhaps
                before the first. None: the first range is in turn, and at least one is read.
        """
        out: list[bytes | Reject] = []
        size = 0
        for _, run in itertools.groupby(ranges, lambda one: one.place.text):
            for group in self._groups(list(run)):
                try:
                    found = self._fetch(group[0].place, group, ahead)
                except _NotNow:
                    return out
                out += found
                size += sum(len(one) for one in found if isinstance(one, bytes))
                if size > CHUNK_BYTES or len(found) < len(group):
                    return out
        return out

    def _groups(self, run: list[Range]) -> Iterator[list[Range]]:
        if _kind(run[0].place) == "parquet":
            yield run
            return
        group: list[Range] = []
        for one in run:
            if group and not _follows(group, one):
                yield group
                group = []
            group.append(one)
        yield group

    def _fetch(
        self, place: Location, group: list[Range], ahead: "_Ahead | None"
    ) -> list[bytes | Reject]:
        """The ranges of a group; of a Parquet file perhaps only the first ones, at least one.

        A store that does not answer is asked again (`Patience`).
        """
        # Other rows of a Parquet file may be in a row group that can be read.
        count = 1 if _kind(place) == "parquet" else len(group)
        try:
            do = functools.partial(self._fetch_once, place, group, ahead)
            return self._patience(place).call(do, place.may_pass)
        except StoreError as error:
            return [Reject(UNREAD, short(error))] * count
        except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
            return [_Missing(f"{place}: {one_line(error)}", short(error))] * len(group)
        except (ValueError, *ERRORS) as error:  # ValueError: also what Arrow calls invalid
            return [unreadable(f"{place}: {one_line(error)}")] * (
                len(group) if isinstance(error, ValueError) else count
            )

    def _fetch_once(
        self, place: Location, group: list[Range], ahead: "_Ahead | None"
    ) -> list[bytes | Reject]:
        if ahead is None:
            return self._fetch_now(place, group)
        admitted = got = 0

        def admit(size: int) -> None:
            nonlocal admitted
            ahead.take(size)
            admitted += size

        try:
            found = self._fetch_now(place, group, admit)
            got = sum(len(one) for one in found if isinstance(one, bytes))
            return found
        finally:
            ahead.hold(got - admitted)

    def _fetch_now(
        self,
        place: Location,
        group: list[Range],
        admit: Callable[[int], None] = lambda size: None,
    ) -> list[bytes | Reject]:
        match _kind(place):
            case "parquet":
                return self._parquet.read(place, [one.offset for one in group], most=CHUNK_BYTES)
            case "demo":
                seed, _, index = place.text.removeprefix("demo://").partition("/")
                return [demo.read(int(seed), int(index))]
            case "remote":
                return files.read_remote(place, group, admit=admit)
            case _:
                return files.read_local(place.path, group)


def core_wait_s(thread: int) -> float | None:
    """Seconds that a thread of this process was ready to run and had no core.

    It is the second figure of the thread's schedstat; None if the system does not tell.

    thread: its native id.
    """
    try:
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


_TELLS = core_wait_s(threading.get_native_id()) is not None  # on Linux


def _off_s() -> float:
    """Seconds that this thread has waited for a disk, a network or the interpreter.

    Only differences of it mean something.
    """
    return (
        time.perf_counter() - time.thread_time() - (core_wait_s(threading.get_native_id()) or 0.0)
    )


def _chunks(ranges: list[Range], threads: int) -> Iterator[list[Range]]:
    """Rows for one turn of an I/O thread.

    Enough to make the hand-over cheap, and few enough for all threads to have some. Only one row if
    it is a request of its own to a store.
    """
    rows = min(max(len(ranges) // (4 * min(max(threads, 1), FEW)), 1), CHUNK_ROWS)
    start = 0
    while start < len(ranges):
        one = ranges[start]
        alone = one.length < 0 and _kind(one.place) == "remote"
        stop = start + 1 if alone else min(start + rows, len(ranges))
        yield ranges[start:stop]
        start = stop


def _held(first: bytes | Reject, found: Iterator[bytes | Reject]) -> list[bytes | Reject]:
    """`first` and what comes next, up to HELD_BYTES and one image."""
    held, size = [first], 0
    for one in found:
        held.append(one)
        size += len(one) if isinstance(one, bytes) else 0
        if size > HELD_BYTES:
            break
    return held


def _kind(place: Location) -> str:
    if place.store is not None and place.store.scheme == "demo":
        return "demo"
    if place.path.endswith(PARQUET) or place.path.lower().endswith(PARQUET):
        return "parquet"
    return "remote" if place.is_remote else "local"


def _follows(group: list[Range], one: Range) -> bool:
    last = group[-1]
    if last.length < 0 or one.length < 0:
        return False
    end = last.offset + last.length
    return (
        end <= one.offset <= end + _GAP and one.offset + one.length - group[0].offset <= CHUNK_BYTES
    )


class _NotNow(Exception):
    """There is no room to read an image ahead of its turn."""


class _Ahead:
    """The bytes that one call of `Reader.read` has read, or begun to read, and not yet given."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = 0
        self._largest = 1

    def take(self, size: int) -> None:
        """Take room for `size` bytes. Raises _NotNow if there is none."""
        with self._lock:
            self._largest = max(self._largest, size)
            if self._held + size > AHEAD_BYTES:
                raise _NotNow
            self._held += size

    def hold(self, size: int) -> None:
        """Count `size` bytes more, or less."""
        with self._lock:
            self._held += size

    def at_once(self, most: int) -> int:
        """How many chunks to read ahead, `most` at most: what was refused was asked for in vain."""
        return max(1, min(most, AHEAD_BYTES // self._largest))


class _Missing(Reject):
    """A file that is missing or forbidden so far. `short`: the reason without its name."""

    def __init__(self, detail: str, short: str) -> None:
        super().__init__("unreadable", detail)
        self.short = short
