"""A process that has imported what actors import. Ray's workers and the probe are forked from it.

    python -m raypipe.run.cluster.forkserver LISTENING PYTHONPATH MODULE ...

Of the 1.6 s of CPU that a worker takes to start, 1.1 s are imports. A fork has these modules
already, and shares their 70 MB with other workers.

The server must not import Ray: forks would share the state from which Ray draws its ids. It must
not run threads: a fork has their locks, but not the threads. It ends when its standard input ends,
which is when the driver ends.
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
from collections.abc import Iterable
from typing import Any

from raypipe.run import processes
from raypipe.run.cluster import forked

ALWAYS = (
    "asyncio",
    "filelock",
    "google.protobuf.json_format",
    "jsonschema",
    "msgpack",
    "packaging.version",
    "pandas",
    "pdb",
    "psutil",
    "pyarrow.compute",
    "pyarrow.parquet",
    "requests",
    "tqdm.auto",
    "wcwidth",
    "yaml",
)
"""What Ray and Ray Data import in a worker that runs an actor, themselves excepted. With these, to
import both takes 0.4 s instead of 1.1 s."""

_HARMLESS = "jemalloc_bg_thd"
"""A thread of pyarrow's allocator, which starts it again in a fork."""

_OF_NO_IMPORT = {"PWD", "OLDPWD", "PS1", "SHLVL", "_", "SPT_NOENV"}
"""Variables that shells and setproctitle set. No module reads them."""

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
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # it would start threads
    with socket.socket(fileno=int(number)) as listening:
        for module in (*modules, *ALWAYS):
            with contextlib.suppress(Exception):  # the worker that needs it reports the error
                importlib.import_module(module)
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
    gc.collect()
    gc.freeze()  # else collections in the forks would copy the shared pages
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listening.accept()
        with connection:
            asked = _answer(connection, environment)
        if asked is not None:
            return asked


def _answer(connection: socket.socket, environment: dict[str, str]) -> dict[str, Any] | None:
    """Fork for one request. Returns it in the fork, with its standard streams in place.

    A process that gets no answer starts by itself.
    """
    streams, asked = list[int](), dict[str, Any]()
    try:
        data, streams, _, _ = socket.recv_fds(connection, _READ, 3)
        while more := connection.recv(_READ):
            data += more
        asked = json.loads(data)
        is_fork = _may_fork() and _is_like(asked, environment) and os.fork() == 0
    except (OSError, ValueError):
        is_fork = False
    if is_fork:
        if asked["argv"][:2] == forked.MODULE:
            _end_with(connection)
        connection.sendall(b"1")
        for to, stream in enumerate(streams):
            os.dup2(stream, to)
    for stream in streams:
        os.close(stream)
    return asked if is_fork else None


def _may_fork() -> bool:
    """Whether a fork is safe: no module has imported Ray, or started a thread."""
    names = set()
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != os.getpid():
            with open(f"/proc/self/task/{thread}/comm") as name:
                names.add(name.read().strip())
    return names <= {_HARMLESS} and "ray" not in sys.modules


def _end_with(connection: socket.socket) -> None:
    """Have the kernel end this process when the other side of `connection` is closed, by SIGIO."""
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC)
    os.dup(connection.fileno())  # it stays open until this process ends


def _is_like(asked: dict[str, Any], environment: dict[str, str]) -> bool:
    """Whether a process has this Python, and variables with which it imports the same modules.

    A runtime environment may change both. Ray Train's only sets variables for Ray. The driver
    starts modules of raypipe as it started this server.
    """
    if asked["argv"][:2] == forked.MODULE:
        return True
    theirs = asked["env"]
    differ = {
        name
        for name in theirs.keys() | environment.keys()
        if theirs.get(name, "") != environment.get(name, "") and not name.startswith("RAY_")
    }
    return asked["python"] == sys.executable and differ <= _OF_NO_IMPORT


def _become(asked: dict[str, Any]) -> None:
    """Run a module, or Ray's file of a worker, as if this process had been started with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # the raylet ends a worker's process group
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # else all workers would draw the same numbers; Python reseeds itself
    if asked["argv"][:2] == forked.MODULE:
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
