"""Why an execution ended: the innermost cause of one of Ray's errors, in words."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    UserCodeException,
    WorkerCrashedError,
)

from raypipe.errors import UsageError, printable


def _of_ray() -> tuple[type[Exception], ...]:
    """The errors of Ray, as far as it is imported.

    Who has not imported ray.train (0.4 s of CPU) or ray.data (1.3 s) does not meet its errors.
    """
    kinds = {
        "ray.train": ("TrainingFailedError",),
        "ray.data.exceptions": ("SystemException", "ExecutionTimeoutError"),
    }
    loaded = [(sys.modules[name], names) for name, names in kinds.items() if name in sys.modules]
    return (RayError, *(getattr(module, name) for module, names in loaded for name in names))


def breaks() -> tuple[type[Exception], ...]:
    """The errors that end an execution. Others are defects."""
    return (*_of_ray(), OSError, TimeoutError)


class Untouched(KeyboardInterrupt):
    """An interruption before anything was changed."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the innermost last."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        below = next(iter(getattr(now, "worker_failures", {}).values()), None)
        for name in ("_base_exc", "cause", "__cause__"):
            if below is None and isinstance(found := getattr(now, name, None), BaseException):
                below = found
        now = below


def cause_of(error: BaseException) -> str:
    """Why an execution ended, in one line: the innermost cause, with the file or host it names."""
    chain = list(causes(error))
    for one in reversed(chain):
        if not isinstance(one, _of_ray()):
            return _words(one)
    # An actor's error arrives as the text of its traceback: its own causes are lost on the way.
    for one in reversed(chain):
        if (raised := raised_in(str(one))) is not None:
            return raised
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (
            OutOfMemoryError,
            "the machine ran out of memory, and Ray killed an actor. Ask for fewer actors, or a "
            "smaller --actor-memory",
        ),
        (NodeDiedError, "a node of the cluster was lost"),
        (ObjectLostError, "a block was lost with the node or the process that had it"),
        (WorkerCrashedError, "a worker process was killed, from outside or for want of memory"),
        (
            RayActorError,
            "an actor was killed, from outside or for want of memory, more often than it is "
            "started again",
        ),
    )
    for of, words in kinds:
        for one in reversed(chain):
            if isinstance(one, of):
                return f"{words}: {_first_line(one)}"
    return _first_line(next((one for one in reversed(chain) if str(one).strip()), error))


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{error.strerror or type(error).__name__}: {error.filename}", 600)
    text = _first_line(error)
    return text if isinstance(error, OSError | UsageError) else f"{type(error).__name__}: {text}"


_RAISED = re.compile(
    r"^(?:[a-zA-Z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Lost|Exit|Interrupt|Reject)): (.+)$",
    re.MULTILINE,
)
_PLAIN = (
    "OSError",
    "IOError",
    "UsageError",
    "StoreError",
    "PermissionError",
    "FileNotFoundError",
    "TimeoutError",
    "ConnectionError",
)


def raised_in(text: str) -> str | None:
    """The first error of the tracebacks in `text`; None: there is none.

    It is the innermost: Python prints first what was raised first.
    """
    for name, said in _RAISED.findall(text):
        if name not in (UserCodeException.__name__, "SystemException"):
            said = re.sub(r"^\[Errno \d+\] ", "", said)
            return printable(said if name in _PLAIN else f"{name}: {said}", 600)
    return None


def _first_line(error: BaseException) -> str:
    """The first line of an error's text that is no header or trace of Ray's."""
    for line in str(error).splitlines():
        line = line.strip()
        if line and not line.startswith(("ray::", "File ", "Traceback", "\x1b", "^", "UDF failed")):
            return printable(line, 600)
    return type(error).__name__


_LOGS = (
    "dashboard_agent.log",
    "runtime_env_agent.log",
    "dashboard.log",
    "monitor.err",
    "raylet.err",
    "gcs_server.err",
)


def raised_in_logs() -> str | None:
    """The error in the logs of the last Ray that this process started, with the file; None: none.

    Ray names the folder of a session after its driver's process id.
    """
    root = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray"
    for folder in sorted(root.glob(f"session_*_{os.getpid()}"), reverse=True)[:1]:
        for name in _LOGS:
            path = folder / "logs" / name
            with contextlib.suppress(OSError):
                raised = _RAISED.findall(path.read_text(errors="replace"))
                if raised:
                    return printable(f"{raised[-1][0]}: {raised[-1][1]} (in {path})", 600)
    return None
