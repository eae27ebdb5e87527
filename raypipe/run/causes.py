"""Why an execution ended: the innermost cause of an error of Ray's, in words."""

from collections.abc import Iterator

import ray.train
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from raypipe.errors import printable


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it was made from, the innermost last."""
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
    """Why an execution ended, in one line of words: the innermost cause, with the file or host that it names."""
    *_, inner = causes(error)
    text = _first_line(inner)
    match inner:
        case OutOfMemoryError():
            return (
                f"the machine ran out of memory, and Ray killed an actor. Ask for fewer actors, or a smaller --actor-memory. {text}"
            )
        case ActorDiedError() | WorkerCrashedError():
            return f"an actor was killed, from outside or for want of memory, more often than it is started again: {text}"
        case NodeDiedError():
            return f"a node of the cluster was lost: {text}"
        case RayTaskError():
            return text
        case OSError() if inner.filename is not None:
            return f"{inner.strerror or type(inner).__name__}: {inner.filename}"
        case _:
            known = isinstance(inner, OSError | RayError | ray.train.TrainingFailedError)
            return text if known and text else f"{type(inner).__name__}: {text}".removesuffix(": ")


def _first_line(error: BaseException) -> str:
    """The first line of what an error says that is no header, hint or trace of Ray's."""
    for line in str(error).splitlines():
        line = line.strip()
        if line and not line.startswith(("ray::", "File ", "Traceback", "\x1b", "At least one of the input")):
            return printable(line, 600)
    return type(error).__name__
