"""The runs of this machine: a small file each in the user's cache folder, as long as the run.

Each run that starts a Ray of its own is alone on it, so no Ray knows them all. The registry does,
and whoever watches or scales joins the Ray of the run that is meant and no other.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from raypipe.data import lease
from raypipe.errors import UsageError, foreign

RENEW_S = 30.0
FREE_AFTER_S = 300.0
"""An entry of another host or boot counts as ended when its file has not changed for so long."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run that goes on. `address`: HOST:PORT of its Ray. `output`: where its results go."""

    run_id: str
    address: str
    output: str | None
    host: str
    boot: str
    pid: int
    process_started: float
    started: str


def folder() -> Path:
    """Where the files are: in XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raypipe" / "runs"


@contextlib.contextmanager
def registered(run_id: str, *, address: str, output: str | None) -> Iterator[None]:
    """Have the run in the registry until the end of the block. A cache folder that cannot be
    written to costs only that: runs are then found by their address."""
    me = lease.myself(run_id)
    entry = Entry(
        run_id=run_id,
        address=address,
        output=output,
        host=me.host,
        boot=me.boot,
        pid=me.pid,
        process_started=me.process_started,
        started=me.started,
    )
    path = folder() / f"{run_id}-{me.token[:8]}.json"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(entry), indent=1))
        temporary.rename(path)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(OSError):
                os.utime(path)

    threading.Thread(target=renew, daemon=True, name="raypipe-registry").start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            path.unlink()


def entries() -> list[Entry]:
    """The runs that go on, newest first. Entries of runs that ended without removing theirs go."""
    found = []
    here = lease.boot()
    for path in folder().glob("*.json"):
        try:
            data = path.read_bytes()
            with foreign(str(path), remedy=""):
                entry = Entry(**json.loads(data))
                if entry.boot == here:
                    alive = lease.is_alive(int(entry.pid), float(entry.process_started))
                else:  # another host, a container, or this host before it was started again
                    alive = time.time() - path.stat().st_mtime < FREE_AFTER_S
        except (OSError, UsageError):  # it ended between the two looks, or is no entry
            continue
        if alive:
            found.append(entry)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return sorted(found, key=lambda entry: str(entry.started), reverse=True)
