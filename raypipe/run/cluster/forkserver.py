"""A process that has imported what actors import. Ray's workers and the probe are forked from it.

    python -m raypipe.run.cluster.forkserver LISTENING PYTHONPATH MODULE ...

Of the 1.6 s of CPU that a worker takes to start, 1.5 s are imports. A fork has these modules
already, and shares their 120 MB (500 with torch) with other workers.

The server imports Ray when the first worker is asked for, with that worker's variables: Ray reads
them only then. The server must not draw an id of Ray: all forks would draw the same ids after it.
It must not run threads: a fork has their locks, but not the threads. It ends when its standard
input ends, which is when the driver ends.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from io import RawIOBase
from typing import Any, NoReturn

from raypipe.run import processes
from raypipe.run.cluster import forked, internals

ALWAYS = (
    "asyncio",
    "click",
    "colorful",
    "filelock",
    "google.protobuf.json_format",
    "jsonschema",
    "msgpack",
    "packaging.version",
    "pandas",
    "pdb",
    "psutil",
    "pyarrow.compute",
    "pyarrow.json",
    "pyarrow.parquet",
    "pydantic.dataclasses",
    "pydantic.v1",
    "requests",
    "tqdm.auto",
    "wcwidth",
    "yaml",
)
"""What Ray and Ray Data import in a worker that runs an actor, themselves excepted: 0.5 s."""

OF_RAY = (
    "ray._private.workers.default_worker",
    "ray._private.arrow_serialization",
    "ray._common.pydantic_compat",
    "ray.data._internal.execution.streaming_executor",
    "ray.data._internal.issue_detection",
    "ray.data._internal.planner.plan_udf_map_op",
    "raypipe.run.cluster.helpers",
    "raypipe.run.live.collector",
    "raypipe.run.meter",
)
"""Ray's file of a worker, and what it imports to run an actor of Ray Data: 0.8 s more."""

_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""numpy's library would start threads as it is imported."""

_HARMLESS = "jemalloc_bg_thd"
"""A thread of pyarrow's allocator, which starts it again in a fork."""

_NO_JOB = {"RAY_JOB_ID": "ffffffff"}
"""Of a worker that any job may take, as those that Ray starts in advance. Ray reads its job's id as
it is imported, and a worker of one job waits in vain for another."""

_OF_NO_IMPORT = {
    *("PWD", "OLDPWD", "PS1", "SHLVL", "_", "SPT_NOENV", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"),
    *_NO_JOB,
}
"""Variables that may differ. No module reads them as it is imported: those of shells, setproctitle
and Ray Train. Or a fork has none of them: the job."""

_READ = 1 << 16


class ForkServer:
    """The server's process, as its driver sees it."""

    def __init__(self, modules: Iterable[str]):
        self._folder = tempfile.TemporaryDirectory(prefix="raypipe-")  # for this user alone
        self._address = os.path.join(self._folder.name, "workers")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self._address)
            listening.listen(1024)  # requests wait here until the server is ready
            number = listening.fileno()
            self._process = processes.start(
                __name__,
                str(number),
                os.environ.get("PYTHONPATH", ""),
                *modules,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[number],
            )

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    def instead_of(self, worker: str) -> str:
        """What a raylet runs in place of Ray's file of a worker."""
        return subprocess.list2cmdline([forked.__file__, self._address, worker])

    def start(self, module: str, *arguments: str, **given: Any) -> subprocess.Popen[bytes]:
        """As `processes.start`, with what the server has imported."""
        through = (forked.__file__, self._address)
        return processes.start(module, *arguments, through=through, **given)

    def close(self) -> None:
        """End the server, if it has not ended. Workers go on."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


# --- the server's own process ----------------------------------------------------------------


def main() -> None:
    """Import, then serve. A fork goes on as Ray's worker, or as a module of raypipe."""
    _, number, path, *modules = sys.argv
    atexit.register(_leave)  # the first to be registered is the last to be called
    environment = os.environ | {"PYTHONPATH": path}
    os.environ.update(_ONE_THREAD)
    with socket.socket(fileno=int(number)) as listening:
        _import((*modules, *ALWAYS))
        asked = _serve(listening, environment)
        address = listening.getsockname()
    if asked is not None:
        _become(asked)
    else:  # the driver was killed, or it would have ended this process
        shutil.rmtree(os.path.dirname(address), ignore_errors=True)


def _leave() -> None:
    """Exit without the interpreter's teardown. All other exit handlers have run before.

    The teardown of a fork's modules copies the pages it shares: with torch, 0.6 s of CPU.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(0)  # nobody asks for the status of a fork


def _serve(listening: socket.socket, environment: dict[str, str]) -> dict[str, Any] | None:
    """Fork for each request. Returns it in the fork, and None at the end of standard input.

    Args:
        environment: of the driver.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks leave no zombies
    of_first: dict[str, str] | None = None  # the variables of the first worker
    shares_ray = False
    _share()
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listening.accept()
        with connection:
            asked, streams = _received(connection)
            may_fork = _is_module(asked) or _is_like(asked, environment)
            if may_fork and not _is_module(asked):
                if of_first is None:
                    of_first = asked["env"]
                    shares_ray = _import_ray(of_first)
                    _share()
                may_fork = shares_ray and _are_like(asked["env"], of_first, of_ray=True)
            is_fork = may_fork and _has_one_thread() and _fork(connection, asked, streams)
            for stream in streams:
                os.close(stream)
        if is_fork:
            return asked


def _share() -> None:
    """Keep forks from copying the pages of what is there: the collector would write to them."""
    gc.collect()
    gc.freeze()


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and its standard streams; an empty one where none came."""
    streams = list[int]()
    with contextlib.suppress(OSError, ValueError):
        data, streams, _, _ = socket.recv_fds(connection, _READ, 3)
        while more := connection.recv(_READ):
            data += more
        return json.loads(data), streams
    return {}, streams


def _fork(connection: socket.socket, asked: dict[str, Any], streams: list[int]) -> bool:
    """Whether this is the fork, with its standard streams in place."""
    try:
        if os.fork():
            return False
    except OSError:  # no answer: the process starts by itself
        return False
    if _is_module(asked):
        _end_with(connection)
    connection.sendall(b"1")
    for to, stream in enumerate(streams):
        os.dup2(stream, to)
    return True


def _has_one_thread() -> bool:
    """Whether no module has started a thread, whose locks a fork would have."""
    names = set()
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != os.getpid():
            with open(f"/proc/self/task/{thread}/comm") as name:
                names.add(name.read().strip())
    return names <= {_HARMLESS}


def _import_ray(environment: dict[str, str]) -> bool:
    """Import what workers import of Ray, with the variables of one. Whether forks may share it."""
    if "ray" in sys.modules:  # some module has imported it, with other variables
        return False
    os.environ.clear()
    os.environ.update(environment | _NO_JOB | _ONE_THREAD)
    if not internals.missing("forking"):
        with _ids_of_the_system():
            _import(OF_RAY)
    return _ids_differ()


@contextlib.contextmanager
def _ids_of_the_system() -> Iterator[None]:
    """Each class of actors draws an id when it is imported. Do not let it seed Ray's generator."""
    from ray import actor

    kind = actor.ActorClassID

    class Ids:
        @staticmethod
        def from_random() -> Any:
            return kind(os.urandom(kind.size()))

    with internals.replaced(actor, "ActorClassID", Ids):
        yield


def _ids_differ() -> bool:
    """Whether two forks draw different ids. Ray seeds its generator when it draws the first."""
    ids = set()
    with contextlib.suppress(OSError):
        for _ in range(2):
            reading, writing = os.pipe()
            with open(reading, "rb") as read, open(writing, "wb", buffering=0) as write:
                if os.fork() == 0:
                    _draw(write)
                write.close()
                ids.add(read.read())
    return len(ids) == 2


def _draw(write: RawIOBase) -> NoReturn:
    """Draw an id of Ray, tell it and exit."""
    try:
        from ray import ObjectRef

        write.write(ObjectRef.from_random().binary())
    finally:
        os._exit(0)


def _import(modules: Iterable[str]) -> None:
    for module in modules:
        with contextlib.suppress(Exception):  # the worker that needs it reports the error
            importlib.import_module(module)


def _end_with(connection: socket.socket) -> None:
    """Have the kernel end this process when the other side of `connection` is closed, by SIGIO."""
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC)
    os.dup(connection.fileno())  # it stays open until this process ends


def _is_module(asked: dict[str, Any]) -> bool:
    """Whether it is one of raypipe. The driver starts these as it started this server."""
    return asked.get("argv", [])[:2] == forked.MODULE


def _is_like(asked: dict[str, Any], environment: dict[str, str]) -> bool:
    """Whether a worker has this Python, and variables with which it imports the same modules.

    A runtime environment may change both.
    """
    same_python = asked.get("python") == sys.executable
    return same_python and _are_like(asked["env"], environment, of_ray=False)


def _are_like(some: dict[str, str], others: dict[str, str], *, of_ray: bool) -> bool:
    """Whether the same is imported with both. Either Ray's variables decide that, or all others."""
    return all(
        some.get(name, "") == others.get(name, "")
        for name in some.keys() | others.keys()
        if name.startswith("RAY_") == of_ray and name not in _OF_NO_IMPORT
    )


def _become(asked: dict[str, Any]) -> None:
    """Run a module, or Ray's file of a worker, as if this process had been started with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # the raylet ends a worker's process group
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # else all workers would draw the same numbers; Python reseeds itself
    if _is_module(asked):
        _, _, module, *arguments = asked["argv"]
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # as the raylet does: the kernel kills workers first
    sys.argv = asked["argv"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
