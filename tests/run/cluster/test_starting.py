"""The Ray that raypipe starts: what is there at the first output, what later, and what is left."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raypipe.run.cluster.starting import kept_port
from tests.conftest import ROOT
from tests.support.clusters import answers, environment, wait_for

PROCESSES = {
    "gcs_server": "gcs",
    "raylet/raylet": "raylet",
    "dashboard/dashboard.py": "dashboard",
    "ray::DashboardAgent": "agent",
    "ray::RuntimeEnvAgent": "runtime_env_agent",
    "log_monitor.py": "log_monitor",
    "autoscaler/_private/monitor.py": "monitor",
}


def rays_processes(pid: int) -> dict[str, psutil.Process]:
    """Ray's own processes below `pid`, by name; not those that only wait to become one."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        for part, name in PROCESSES.items():
            if command and not command[0].endswith("/sh") and part in " ".join(command[:4]):
                found[name] = process
    return found


WHAT = """
import json, os, sys
import ray
from raypipe.run.cluster import internals
from raypipe.run.preprocess import Settings, run

for purpose in sys.argv[1:]:
    internals.PINNED[purpose]["ray.gone:X"] = ()

def look(block):
    from tests.run.cluster.test_starting import rays_processes
    actors = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    print(json.dumps([sorted(rays_processes(os.getpid())), sorted(actors)]), flush=True)

given = dict(input="demo:8", actors=1, shard_rows=8, run_id="it")
outcome = run(Settings.of(**given), consume=look)
assert outcome.report["images_out"] == 8
assert not ray.is_initialized()
from ray.data._internal import stats
from ray.data._internal.execution import streaming_executor
print(stats.get_or_create_stats_actor.__module__, end=" ")
print(streaming_executor.create_cluster_autoscaler.__module__)
"""

QUICK = {"gcs", "raylet"}
WHOLE = {*QUICK, "dashboard", "agent", "runtime_env_agent", "log_monitor", "monitor"}
HELPERS = {"ActorLocationTracker", "AutoscalingCoordinator", "datasets_stats_actor"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gone", "processes", "helpers"),
    [((), QUICK, set()), (("starting", "helpers"), WHOLE, HELPERS)],
    ids=["quick", "a Ray with other internals"],
)
def test_at_the_first_output_only_what_it_needs_is_there(gone, processes, helpers):
    done = subprocess.run(
        [sys.executable, "-c", WHAT, *gone],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen, modules = done.stdout.splitlines()
    there, actors = json.loads(seen)
    assert set(there) == processes
    assert set(actors) == {"raypipe-it", *helpers}, done.stdout
    # Another Ray of this process has its own functions again.
    assert modules == "ray.data._internal.stats ray.data._internal.cluster_autoscaler"


TRAINS = """
import json, os
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from raypipe.run.cluster.session import ray_session
from raypipe.run.preprocess import Settings, preprocessing
from tests.run.cluster.test_starting import rays_processes

def callbacks():
    trainer = DataParallelTrainer(lambda: None)
    return [type(one).__name__ for one in trainer._create_default_callbacks()]

stages = preprocessing(Settings.of(input="demo:8")).stages("it")
with ray_session(stages, trains=True):
    print(json.dumps([sorted(rays_processes(os.getpid())), callbacks()]))
print("PlacementGroupCleanerCallback" in callbacks())
"""


@pytest.mark.slow
def test_what_ray_train_needs_is_there_at_once_and_what_it_would_wait_for_is_not():
    done = subprocess.run(
        [sys.executable, "-c", TRAINS],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    within, after = done.stdout.splitlines()
    there, callbacks = json.loads(within)
    # Its actors have a runtime environment. Its workers may have GPUs and no CPU beside the pools.
    assert set(there) == {*QUICK, "agent", "runtime_env_agent"}
    assert "DatasetsCallback" in callbacks and "PlacementGroupCleanerCallback" not in callbacks
    assert after == "True"


ARGUMENTS = ("--input", "demo:80", "--actors", "1", "--read-ms", "1000", "--shard-rows", "1")


@contextlib.contextmanager
def started(**more: str) -> Iterator[subprocess.Popen]:
    """A job with a Ray of its own, of a minute, with `more` in its environment."""
    process = subprocess.Popen(
        [sys.executable, "jobs/preprocess.py", *ARGUMENTS],
        cwd=ROOT,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def job() -> Iterator[subprocess.Popen]:
    with started() as process:
        yield process


def gone(processes: list[psutil.Process]) -> bool:
    """Whether they have ended, within the time that Ray's own take to notice."""
    return not psutil.wait_procs(processes, timeout=60)[1]


@pytest.mark.slow
def test_dashboard_job_server_and_metrics_are_there_soon_and_end_with_the_run(job):
    assert job.stderr is not None
    opening = next(line for line in job.stderr if line.startswith("Run "))
    address = re.search(r"Ray dashboard: (http://127\.0\.0\.1:(\d+))", opening)
    assert address, opening
    wait_for(lambda: answers(int(address[2])), job)
    wait_for(lambda: {"agent", "runtime_env_agent"} <= rays_processes(job.pid).keys(), job)
    token = (Path.home() / ".ray/auth_token").read_text().strip()
    asked = urllib.request.Request(
        f"{address[1]}/api/version", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(asked, timeout=60) as version:
        assert json.load(version)["ray_version"]  # the job server's
    # From another terminal, whose environment says nothing of a token.
    command = [sys.executable, "-c", "from raypipe.cli import main; main()", "runs"]
    told = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert opening.split()[1].rstrip(":") in told.stdout, told
    everything = psutil.Process(job.pid).children(recursive=True)
    os.kill(job.pid, signal.SIGINT)
    assert job.wait(timeout=120) == 130
    assert gone(everything)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["raylet", "dashboard"])
def test_an_interrupted_start_leaves_nothing_behind(job, what):
    wait_for(lambda: what in rays_processes(job.pid), job)
    everything = psutil.Process(job.pid).children(recursive=True)
    os.kill(job.pid, signal.SIGINT)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 130 and "Interrupted" in errors and "Traceback" not in errors
    assert gone(everything)


@pytest.mark.slow
def test_a_ray_one_of_whose_processes_dies_as_it_starts_is_told_in_a_line():
    with started(RAY_gcs_server_port_wait_time_s="2") as job:
        wait_for(lambda: "gcs" in rays_processes(job.pid), job)
        rays_processes(job.pid)["gcs"].kill()
        _, errors = job.communicate(timeout=120)
    assert job.returncode == 1 and "Traceback" not in errors
    assert re.search("^error: Ray did not start: .* Try again", errors, re.MULTILINE), errors


def test_a_kept_port_is_for_one_server_and_nobody_else():
    with kept_port("127.0.0.1", [0]) as kept:
        port = kept.getsockname()[1]
        with pytest.raises(OSError):
            kept_port("127.0.0.1", [port])
        with pytest.raises(OSError), socket.socket() as other:
            other.bind(("127.0.0.1", port))
        with kept_port("127.0.0.1", [port, 0]) as next_one:
            assert next_one.getsockname()[1] != port
        with socket.create_server(("127.0.0.1", port)):
            assert answers(port)
