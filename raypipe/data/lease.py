"""One driver at a time into one output: a lease file that says who it is, renewed while that driver lives.

`_raypipe/lease.json` names host, boot, process and the process's start. A driver renews it every
RENEW_S seconds. Whoever comes second is refused, unless the holder is known to be dead:

- a process of this host and boot that is gone frees its lease at once;
- any other lease is free when it has not changed for FREE_AFTER_S seconds of watching. Clocks of
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
from raypipe.data import location
from raypipe.data.names import STATE
from raypipe.errors import foreign, printable

FILE = f"{STATE}/lease.json"

RENEW_S = 10.0
FREE_AFTER_S = 60.0
"""Six renewals: a store that is slow for half a minute does not cost a driver its lease."""


class LeaseLost(OSError):
    """Another driver has taken over the output, so this one must stop."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who has a lease. `process_started`: seconds since 1970; `beat`: how often it was renewed."""

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
    """What tells one boot of one host from others, and one set of process ids from others: containers
    of a host share its boot."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{uuid.getnode():x} {psutil.boot_time():.0f}"


def is_alive(pid: int, started: float) -> bool:
    """Whether that process of this host still runs. `started`: seconds since 1970, within 2 s, as the
    system derives it from a clock that may be set."""
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


def read(root: str) -> tuple[Holder | None, bytes | None]:
    """Who has the lease of `root`, and the content of its file. No file: None, None. A file that says
    nothing of a holder is nobody's, but may be being renewed: None and its content."""
    try:
        data = location.read(location.join(root, FILE))
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


def check(root: str, *, option: str) -> None:
    """Raise UsageError where a process of this host that is alive has the lease of `root`.

    It changes nothing, and does not wait to see whether a holder elsewhere is alive: `hold` does.
    """
    holder, _ = read(root)
    if (
        holder is not None
        and holder.boot == boot()
        and is_alive(holder.pid, holder.process_started)
    ):
        raise _refusal(holder, root, option)


def _refusal(holder: Holder | None, root: str, option: str) -> UsageError:
    by = str(holder) if holder else f"a driver that {location.join(root, FILE)} does not name"
    return UsageError(
        f"{option} {root!r} is being written by another driver: {by}. Two would mix their results, so "
        f"nothing was started and nothing was changed. Wait for it, end it, or give another {option}."
    )


@dataclass
class Lease:
    """A lease that this process has. `check` raises LeaseLost when somebody else has taken it."""

    root: str
    holder: Holder
    _lost: str = ""

    def check(self) -> None:
        """Raise LeaseLost where another driver has taken over."""
        if self._lost:
            raise LeaseLost(
                f"{self.root!r} was taken over by another driver ({self._lost}) while this one did not "
                f"renew its lease for {FREE_AFTER_S:.0f} s. What this one finished is kept."
            )

    def renew(self) -> None:
        """Say that this process is alive; find out whether it has lost the lease."""
        next_ = replace(self.holder, beat=self.holder.beat + 1)
        try:
            if location.replace_same(self.root, FILE, self.holder.data, next_.data):
                self.holder = next_
                return
            holder, data = read(self.root)
            if holder is not None and holder.token == next_.token:
                # An answer that was lost: the store has done it all the same.
                self.holder = holder
            elif data is None and location.create(self.root, FILE, next_.data):
                self.holder = next_  # somebody deleted the file
            else:
                self._lost = str(holder) if holder else "its lease file is not readable"
        except location.ERRORS:
            pass  # the store does not answer: nobody else can take the lease from it meanwhile


@contextlib.contextmanager
def hold(
    root: str, *, run_id: str, option: str, tell: Callable[[str], None] = lambda line: None
) -> Iterator[Lease]:
    """Have the lease of `root`, which the user gave as `option`, renewed until the end of the block.

    Args:
        tell: told, in a line, why it waits.

    Raises:
        UsageError: another driver that is alive has it, or `root` cannot be written to.
    """
    try:
        lease = _acquired(root, myself(run_id), option, tell)
    except location.ERRORS as error:
        raise UsageError(
            f"{option} {root!r} cannot be written to ({location.one_line(error)}). Nothing was changed. Give a place that can."
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
        with contextlib.suppress(*location.ERRORS):
            _release(lease)


def _acquired(root: str, mine: Holder, option: str, tell: Callable[[str], None]) -> Lease:
    while True:
        if location.create(root, FILE, mine.data):
            return Lease(root, mine)
        holder, data = read(root)
        if data is None:
            continue
        here = holder is not None and holder.boot == mine.boot
        if holder is not None and here and is_alive(holder.pid, holder.process_started):
            raise _refusal(holder, root, option)
        if not here:
            _watch(root, data, holder, option, tell)
        if location.replace_same(root, FILE, data, mine.data):
            return Lease(root, mine)


def _watch(
    root: str, data: bytes, holder: Holder | None, option: str, tell: Callable[[str], None]
) -> None:
    """Return when the lease has not changed for FREE_AFTER_S; raise UsageError when it does."""
    tell(
        f"{option} {root!r} has the lease of {holder or 'a driver it does not name'}. Waiting "
        f"{FREE_AFTER_S:.0f} s to see whether that driver renews it ..."
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
        location.delete(location.join(lease.root, FILE))
