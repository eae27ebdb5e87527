"""A process that has imported what actors import. Ray's workers are forked from it.

    python -m raypipe.run.cluster.forkserver LISTENING MODULE ...

Of the 1.6 s of CPU that a worker takes to start, 1.1 s are imports. A fork has these modules
already, and shares their 70 MB with other workers.

The server does not import Ray: Ray's library draws ids from a state that forks would share. It runs
no threads, as a fork has none of them, but has the locks that they held. It ends when its standard
input does, which is when the driver ends.
"""

import contextlib
import gc
import importlib
import json
import os
import random
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

_READ = 1 << 16


class ForkServer:
    """The server's process, as its driver sees it."""

    def __init__(self, modules: Iterable[str]):
        self._folder = tempfile.TemporaryDirectory(prefix="raypipe-")  # for this user alone
        self._address = os.path.join(self._folder.name, "workers")
        # Own ops are in modules that the server must find. OpenBLAS would start threads.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OPENBLAS_NUM_THREADS": "1",
        }
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self._address)
            listening.listen(1024)  # who asks before the server is ready waits
            number = listening.fileno()
            self._process = subprocess.Popen(
                # -P: no module of the current folder is taken for one of a library.
                [sys.executable, "-P", "-m", __name__, str(number), *ALWAYS, *modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=[number],
                start_new_session=True,  # Ctrl-C is for the run, which ends the server
            )

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    def instead_of(self, worker: str) -> str:
        """What a raylet runs in place of Ray's file of a worker."""
        return subprocess.list2cmdline([forked.__file__, self._address, worker])

    def close(self) -> None:
        """End the server. Workers go on."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


# --- the server's own process ----------------------------------------------------------------


def main() -> None:
    """Import, then serve. A fork goes on as Ray's worker."""
    _, number, *modules = sys.argv
    with socket.socket(fileno=int(number)) as listening:
        for module in modules:
            with contextlib.suppress(Exception):  # a worker that needs it will say why
                importlib.import_module(module)
        asked = _serve(listening)
        address = listening.getsockname()
    if asked is not None:
        _become(asked)
    else:  # the driver was killed, or it would have ended this process
        shutil.rmtree(os.path.dirname(address), ignore_errors=True)


def _serve(listening: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns it in the fork, and None at the end of standard input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks leave no zombies
    gc.collect()
    gc.freeze()  # else collections in the forks would copy the shared pages
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listening.accept()
        with connection:
            streams = list[int]()
            # Who is not answered starts as without this server.
            try:
                data, streams, _, _ = socket.recv_fds(connection, _READ, 3)
                while more := connection.recv(_READ):
                    data += more
                is_fork = _may_fork() and os.fork() == 0
            except OSError:
                is_fork = False
            if is_fork:
                connection.sendall(b"1")
                for to, stream in enumerate(streams):
                    os.dup2(stream, to)
            for stream in streams:
                os.close(stream)
            if is_fork:
                return json.loads(data)


def _may_fork() -> bool:
    """Whether no module that was imported has brought Ray or threads."""
    names = set()
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != os.getpid():
            with open(f"/proc/self/task/{thread}/comm") as name:
                names.add(name.read().strip())
    return names <= {_HARMLESS} and "ray" not in sys.modules


def _become(asked: dict[str, Any]) -> None:
    """Run Ray's file of a worker, as if this process had been started with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # the raylet ends a worker's process group
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # as the raylet does: the kernel kills workers first
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # else all workers would draw the same numbers
    sys.argv = asked["argv"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
