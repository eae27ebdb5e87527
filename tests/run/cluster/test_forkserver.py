"""Workers of Ray that are forked: what they share, what each has of its own, and who is none."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import ray

from raypipe.run.cluster.forkserver import ALWAYS, OF_RAY, ForkServer
from raypipe.run.cluster.session import forking
from raypipe.run.preprocess import Settings, preprocessing
from tests.conftest import ROOT
from tests.support.clusters import environment, wait_for

WORKER = """
import json, os, random, sys
numpy = sys.modules.get("numpy")
print(json.dumps({
    "name": __name__,
    "pid": os.getpid(),
    "parent": os.getppid(),
    "group": os.getpgid(0),
    "argv": sys.argv[1:],
    "folder": os.getcwd(),
    "env": dict(os.environ),
    "oom_score_adj": int(open("/proc/self/oom_score_adj").read()),
    "children_reaped_by": str(__import__("signal").getsignal(17)),
    "imported": [name for name in ("cv2", "pandas", "ray", "torch") if name in sys.modules],
    "draws": [random.random(), numpy and numpy.random.random()],
}))
"""


@pytest.fixture
def worker(tmp_path: Path) -> str:
    """A file that stands for Ray's own one of a worker."""
    file = tmp_path / "worker.py"
    file.write_text(WORKER)
    return str(file)


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., ForkServer]]:
    """Starts servers that import the modules they are given."""
    started = []

    def start(*modules: str) -> ForkServer:
        with mock.patch.dict(os.environ, AROUND, clear=True):
            started.append(ForkServer(modules))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def server(serve) -> ForkServer:
    """One for all tests that leave it as it is: it takes 2 s of CPU."""
    return serve("cv2")


AROUND = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""The environment of servers and workers. pytest and other tests change that of this process."""


def begun(
    server: ForkServer, worker: str, *arguments: str, python: str = sys.executable, **more: str
) -> Any:
    """What a worker prints that is begun as a raylet does, with `more` in its environment."""
    done = subprocess.run(
        [python, *server.instead_of(worker).split(), *arguments],
        cwd=os.path.dirname(worker),
        env=AROUND | {"RAY_JOB_ID": "ffffffff"} | more,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_fork_has_what_the_server_imported_and_is_else_like_a_worker_that_was_started(
    server, worker
):
    one = begun(server, worker, "--x=1")
    assert one["name"] == "__main__" and one["argv"] == ["--x=1"]
    assert one["imported"] == ["cv2", "pandas", "ray"]
    assert one["parent"] == server.pid
    assert one["group"] == one["pid"]
    assert one["folder"] == os.path.dirname(worker)
    assert one["env"] == AROUND | {"RAY_JOB_ID": "ffffffff"}
    assert one["oom_score_adj"] == 1000
    assert one["children_reaped_by"] == "0"  # SIG_DFL: a worker waits for its own children


def test_forks_draw_different_numbers(server, worker):
    draws = [begun(server, worker)["draws"] for _ in range(3)]
    for of_one_generator in zip(*draws, strict=True):
        assert len(set(of_one_generator)) == 3


LEAVES = """
import atexit, json, os
class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken apart")
json.kept = Kept()
atexit.register(print, '"left"')
"""


def test_a_fork_does_what_it_registered_for_its_end_and_takes_no_module_apart(server, tmp_path):
    file = tmp_path / "leaves.py"
    file.write_text(LEAVES)
    # Standard output is a pipe: without a flush nothing would come.
    assert begun(server, str(file)) == "left"


@pytest.mark.parametrize(
    ("more", "is_forked"),
    [
        ({"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", "SHLVL": "3"}, True),  # as Ray Train's
        ({"RAY_AUTH_MODE": "token"}, False),
        ({"OMP_NUM_THREADS": "7"}, False),
        ({"PYTHONPATH": "/elsewhere"}, False),
        ({"OF_THE_USER": "1"}, False),
    ],
)
def test_a_worker_whose_variables_may_change_what_it_imports_starts_by_itself(
    more, is_forked, server, worker
):
    assert begun(server, worker)["parent"] == server.pid
    one = begun(server, worker, **more)
    assert one["parent"] == (server.pid if is_forked else os.getpid())
    assert one["env"].items() >= more.items()


READS = """
import os, ray
print([os.getppid(), ray._raylet.Config.worker_register_timeout_seconds()])
"""


def test_the_first_workers_variables_are_those_with_which_ray_is_imported(serve, tmp_path):
    file = tmp_path / "reads.py"
    file.write_text(READS)
    server, name = serve(), "RAY_worker_register_timeout_seconds"
    for value, parent in (("7", server.pid), ("7", server.pid), ("8", os.getpid())):
        assert begun(server, str(file), **{name: value}) == [parent, int(value)]


def test_a_worker_of_another_python_starts_by_itself(server, worker, tmp_path):
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    assert begun(server, worker, python=str(other))["parent"] == os.getpid()


def test_a_worker_starts_by_itself_where_there_is_no_server(serve, worker):
    server = serve("cv2")
    assert begun(server, worker)["parent"] == server.pid
    os.kill(server.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(server.pid)], timeout=30)
    assert begun(server, worker)["parent"] == os.getpid()


MODULE = """
import json, os, sys, time
from pathlib import Path
told = {"pid": os.getpid(), "parent": os.getppid(), "argv": sys.argv[1:], "name": __name__}
told |= {"cv2": "cv2" in sys.modules, "path": sys.path[0], "said": sys.stdin.readline().strip()}
print(json.dumps(told), flush=True)
if sys.argv[1:] == ["stays"]:
    Path("it_is_there").touch()
    sys.stdin.read()
    time.sleep(600)
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """The name of a module that stands for the probe."""
    (tmp_path / "like_the_probe.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return "like_the_probe"


def started(server: ForkServer, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A module that has been told a word."""
    pipe = subprocess.PIPE
    process = server.start(module, *arguments, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    process.stdin.write(b"word\n")
    process.stdin.flush()
    return process


def test_a_module_of_raypipe_is_forked_and_its_process_ends_with_the_fork(serve, module):
    server = serve("cv2")
    process = started(server, module, "x")
    told = json.loads(process.communicate()[0])
    assert (process.returncode, told["parent"]) == (0, server.pid)
    assert told.pop("pid") != process.pid
    assert told == {
        "parent": server.pid,
        "argv": ["x"],
        "name": "__main__",
        "cv2": True,
        "path": sys.path[0],
        "said": "word",
    }


def test_a_module_of_raypipe_starts_by_itself_where_there_is_no_server(serve, module):
    server = serve("cv2")
    server.close()
    process = started(server, module, "x")
    told = json.loads(process.communicate()[0])
    assert (told["pid"], told["argv"], told["said"]) == (process.pid, ["x"], "word")


def test_who_kills_the_process_that_waits_for_a_fork_kills_the_fork(serve, module):
    server = serve("cv2")
    process = started(server, module, "stays")
    assert process.stdout is not None
    fork = psutil.Process(json.loads(process.stdout.readline())["pid"])
    assert fork.ppid() == server.pid
    process.kill()
    assert psutil.wait_procs([fork], timeout=30)[0]
    assert process.stdout.read() == b""  # the end, for which the probe's owner waits
    process.communicate()


def test_who_is_killed_before_the_server_answers_leaves_no_fork(serve, module):
    server = serve("cv2")
    json.loads(started(server, module, "x").communicate()[0])  # the server is ready
    os.kill(server.pid, signal.SIGSTOP)
    process = started(server, module, "stays")
    wait_for(lambda: psutil.Process(process.pid).net_connections("unix"), process)
    time.sleep(0.5)  # the request is sent
    process.kill()
    process.wait()
    os.kill(server.pid, signal.SIGCONT)
    assert process.stdout is not None and process.stdout.read() == b""
    assert json.loads(started(server, module, "x").communicate()[0])["parent"] == server.pid
    assert not os.path.exists("it_is_there")


THREAD = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"


@pytest.mark.parametrize("text", [THREAD, "import ray"], ids=["threads", "Ray"])
def test_a_server_whose_modules_brought_what_forks_must_not_share_forks_nobody(
    text, serve, worker, tmp_path, monkeypatch
):
    (tmp_path / "brings.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    server = serve("brings")
    assert begun(server, worker)["parent"] == os.getpid()
    assert psutil.Process(server.pid).status() != psutil.STATUS_ZOMBIE


def test_a_module_that_is_missing_or_fails_is_left_to_the_workers(
    serve, worker, tmp_path, monkeypatch
):
    (tmp_path / "fails.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    server = serve("no_such_module", "fails", "cv2")
    assert begun(server, worker)["imported"] == ["cv2", "pandas", "ray"]


def test_a_module_in_the_current_folder_is_not_taken_for_a_library(
    serve, worker, tmp_path, monkeypatch
):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("yaml", "json", "pandas"):
        (here / f"{name}.py").write_text("raise SystemExit")
    monkeypatch.chdir(here)
    server = serve("cv2")
    assert begun(server, worker)["imported"] == ["cv2", "pandas", "ray"]


def test_a_driver_that_is_killed_leaves_neither_server_nor_socket():
    code = (
        "import time; from raypipe.run.cluster.forkserver import ForkServer; "
        "server = ForkServer([]); print(server.pid, server.instead_of('worker'), flush=True); "
        "time.sleep(600)"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE
    )
    assert driver.stdout is not None
    pid, _, address, _ = driver.stdout.readline().decode().split()
    server = psutil.Process(int(pid))
    assert os.path.exists(address)
    driver.kill()
    driver.communicate()
    assert psutil.wait_procs([server], timeout=60)[0]
    assert not os.path.exists(os.path.dirname(address))


def test_where_no_socket_can_be_there_is_no_server(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 110)  # a socket's path may have 107 characters
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with forking(preprocessing(Settings.of(input="demo:8")).stages("it")) as server:
        assert server is None
    assert list(folder.iterdir()) == []


SESSIONS = """
from raypipe.run.cluster.session import forking, ray_session
from raypipe.run.preprocess import Settings, preprocessing
import psutil

stages = preprocessing(Settings.of(input="demo:8")).stages("it")
first, second = forking(stages), forking(stages)
forks = first.__enter__()
one, other = ray_session(stages, forks=forks), ray_session(stages)
one.__enter__(), other.__enter__()
with second as none:  # there is a Ray, and no other server
    print(none, psutil.pid_exists(forks.pid))
one.__exit__(None, None, None), first.__exit__(None, None, None)
print(psutil.pid_exists(forks.pid))  # the other goes on
other.__exit__(None, None, None)
print(psutil.pid_exists(forks.pid))
with forking(stages) as forks:
    print(psutil.pid_exists(forks.pid))
print(psutil.pid_exists(forks.pid))
"""


def test_a_server_ends_with_the_last_session_whose_workers_it_starts():
    done = subprocess.run(
        [sys.executable, "-c", SESSIONS],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["None", "True", "True", "False", "True", "False"], done.stderr


IDS = """
import ray
from raypipe.run.cluster.forkserver import _ids_differ, _ids_of_the_system
with _ids_of_the_system():
    import ray.data._internal.stats  # it has a class of actors
print(_ids_differ())
ray.ActorClassID.from_random()
print(_ids_differ())
"""


def test_ids_of_forks_differ_until_their_server_has_drawn_one():
    asked = subprocess.run(
        [sys.executable, "-c", IDS], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert asked.stdout.split() == ["True", "False"], asked.stderr


def test_what_a_worker_imports_of_ray_is_there_to_import(serve, tmp_path):
    """A name that is gone in a later Ray would cost each worker its import, in silence."""
    file = tmp_path / "tells.py"
    file.write_text("import json, sys\nprint(json.dumps(list(sys.modules)))")
    assert set(begun(serve(), str(file))) >= {*ALWAYS, *OF_RAY}


@pytest.mark.smoke
def test_rays_actors_are_forked_and_their_ids_differ(session):
    @ray.remote(num_cpus=0.1)
    class Puts:
        def parent(self) -> str:
            return " ".join(psutil.Process().parent().cmdline())

        def put(self, number: int) -> list:
            return [ray.put(f"{number}-{at}") for at in range(20)]

    actors = [Puts.remote() for _ in range(4)]
    for parent in ray.get([actor.parent.remote() for actor in actors]):
        assert "raypipe.run.cluster.forkserver" in parent
    put = ray.get([actor.put.remote(number) for number, actor in enumerate(actors)])
    for number, references in enumerate(put):
        assert ray.get(references) == [f"{number}-{at}" for at in range(20)]


JOB = """
import sys, psutil, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0.1)
def parent():
    return psutil.Process().parent().pid

print(ray.get(parent.remote()))
"""


@pytest.mark.smoke
def test_a_server_forks_workers_of_several_jobs(session, joined):
    parents = [ray.get(ray.remote(lambda: os.getppid()).options(num_cpus=0.1).remote())]
    for _ in range(2):
        command = [sys.executable, "-c", JOB, joined["RAY_ADDRESS"]]
        done = subprocess.run(command, env=joined, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        parents.append(int(done.stdout))
    (server,) = set(parents)
    assert "raypipe.run.cluster.forkserver" in psutil.Process(server).cmdline()
