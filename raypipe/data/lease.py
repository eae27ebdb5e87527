"""One driver at a time writes to an output: the holder of its lease file.

`_raypipe/lease.json` names the holder's host, boot, process and start. The holder renews it every
RENEW_S seconds. A second driver is refused, unless the holder is known to be dead:

- A process of this host and boot that is gone frees its lease at once.
- Any other lease is free if it does not change within FREE_AFTER_S seconds of watching. Clocks of
  hosts are not compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from raypipe import UsageError
from raypipe.data.location import Location
from raypipe.data.stores import ERRORS, one_line
from raypipe.errors import foreign, printable

RENEW_S = 10.0
FREE_AFTER_S = 60.0
"""Six renewals: a driver keeps its lease if its store is slow for half a minute."""


class LeaseLost(OSError):
    """Another driver has taken over the output, so this one must stop."""


def file_of(root: Location) -> str:
    """The file of the lease of `root`, relative to it."""
    return f"{root.state}/lease.json"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The holder of a lease.

    process_started: seconds since 1970. beat: the number of renewals.
    """

    token: str
    run_id: str
    host: str
    boot: str
    pid: int
    process_started: float
    started: str
    beat: int = 0

    def __str__(self) -> str:
        return printable(
            f"run {self.run_id} of process {self.pid} on {self.host}, started {self.started}"
        )

    @property
    def data(self) -> bytes:
        """As the content of the lease file."""
        return json.dumps(asdict(self), indent=1).encode()


def boot() -> str:
    """An id of this boot of this host, and of its set of process ids.

    Containers of one host share its boot, but not their process ids.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{uuid.getnode():x} {psutil.boot_time():.0f}"


def is_alive(pid: int, started: float) -> bool:
    """Whether that process of this host still runs.

    started: seconds since 1970, compared within 2 s, because the system's clock may be set.
    """
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except psutil.AccessDenied:
        return True


def myself(run_id: str) -> Holder:
    """This process, as the holder of a lease for `run_id`."""
    return Holder(
        token=uuid.uuid4().hex,
        run_id=run_id,
        host=socket.gethostname(),
        boot=boot(),
        pid=os.getpid(),
        process_started=psutil.Process().create_time(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def read(root: Location) -> tuple[Holder | None, bytes | None]:
    """The holder of the lease of `root`, and the content of its file; None and None without a file.

    An unreadable file gives None and its content: it has no known holder, but may be in renewal.
    """
    try:
        data = (root / file_of(root)).read(once=True)  # a lease is about time
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    try:
        with foreign("the lease", remedy=""):
            holder = Holder(**json.loads(data))
            if not isinstance(holder.pid, int) or not isinstance(
                holder.process_started, float | int
            ):
                raise TypeError("pid and process_started are numbers")
            return holder, data
    except UsageError:
        return None, data


def check(root: Location, *, option: str) -> None:
    """Check that no living process of this host has the lease of `root`. It changes nothing.

    It does not wait to see whether a holder on another host is alive; `hold` does.

    Raises:
        UsageError: a process has it.
    """
    holder, _ = read(root)
    if (
        holder is not None
        and holder.boot == boot()
        and is_alive(holder.pid, holder.process_started)
    ):
        raise _refusal(holder, root, option)


def _refusal(holder: Holder | None, root: Location, option: str) -> UsageError:
    by = str(holder) if holder else f"a driver that {root / file_of(root)} does not name"
    return UsageError(
        f"{option} {str(root)!r} is being written by another driver: {by}. Two would mix their "
        "results, so nothing was started and nothing was changed. Wait for it, end it, or give "
        f"another {option}."
    )


@dataclass
class Lease:
    """A lease that this process has. `check` raises LeaseLost when somebody else has taken it."""

    root: Location
    holder: Holder
    _lost: str = ""

    def check(self) -> None:
        """Raise LeaseLost if another driver has taken over."""
        if self._lost:
            raise LeaseLost(
                f"{str(self.root)!r} was taken over by another driver ({self._lost}) while this "
                f"one did not renew its lease for {FREE_AFTER_S:.0f} s. What this one finished is "
                "kept."
            )

    def renew(self) -> None:
        """Record that this process is alive, and find out whether it has lost the lease."""
        next_ = replace(self.holder, beat=self.holder.beat + 1)
        try:
            if self.root.replace_same(file_of(self.root), self.holder.data, next_.data):
                self.holder = next_
                return
            holder, data = read(self.root)
            if holder is not None and holder.token == next_.token:
                # The store had renewed it, but its answer was lost.
                self.holder = holder
            elif data is None and self.root.create(file_of(self.root), next_.data):
                self.holder = next_  # somebody deleted the file
            else:
                self._lost = str(holder) if holder else "its lease file is not readable"
        except ERRORS:
            pass  # while the store does not answer, nobody else can take the lease


@contextlib.contextmanager
def hold(
    root: Location, *, run_id: str, option: str, tell: Callable[[str], None] = lambda line: None
) -> Iterator[Lease]:
    """Hold the lease of `root`, and renew it, until the end of the block.

    Args:
        option: the flag by which the user gave `root`.
        tell: called with a line that says why it waits.

    Raises:
        UsageError: another living driver has it, or `root` cannot be written to.
    """
    try:
        lease = _acquired(root, myself(run_id), option, tell)
    except ERRORS as error:
        raise UsageError(
            f"{option} {str(root)!r} cannot be written to ({one_line(error)}). Nothing was "
            "changed. Give a place that can."
        ) from error
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            lease.renew()

    thread = threading.Thread(target=renew, daemon=True, name="raypipe-lease")
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(*ERRORS):
            _release(lease)


def _acquired(root: Location, mine: Holder, option: str, tell: Callable[[str], None]) -> Lease:
    while True:
        if root.create(file_of(root), mine.data):
            return Lease(root, mine)
        holder, data = read(root)
        if data is None:
            continue
        here = holder is not None and holder.boot == mine.boot
        if holder is not None and here and is_alive(holder.pid, holder.process_started):
            raise _refusal(holder, root, option)
        if not here:
            _watch(root, data, holder, option, tell)
        if root.replace_same(file_of(root), data, mine.data):
            return Lease(root, mine)


def _watch(
    root: Location, data: bytes, holder: Holder | None, option: str, tell: Callable[[str], None]
) -> None:
    """Wait until the lease has not changed for FREE_AFTER_S. Raises UsageError if it changes."""
    tell(
        f"{option} {str(root)!r} has the lease of {holder or 'a driver it does not name'}. "
        f"Waiting {FREE_AFTER_S:.0f} s to see whether that driver renews it ..."
    )
    until = time.monotonic() + FREE_AFTER_S
    while time.monotonic() < until:
        time.sleep(min(1.0, RENEW_S))
        there, now = read(root)
        if now is None:
            return
        if now != data:
            raise _refusal(there, root, option)


def _release(lease: Lease) -> None:
    holder, _ = read(lease.root)
    if holder is not None and holder.token == lease.holder.token:
        (lease.root / file_of(lease.root)).delete()
