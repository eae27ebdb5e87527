"""Start a Ray for one test as a user does, on free ports, and end it by process id."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


def environment(**more: str) -> dict[str, str]:
    """The environment of a user who has not started Ray. Ray's usage actor takes 1 s of CPU."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return outside | {"RAY_USAGE_STATS_ENABLED": "0"} | more


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    """Until `condition` holds, while `process` runs."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, (
            f"ended by itself with {process.returncode}: {process.communicate()}"
        )
        assert time.time() < deadline, "nothing happened"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def answers(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@dataclass(frozen=True)
class Head:
    """A cluster of one node."""

    address: str  # for RAY_ADDRESS
    client: str  # by Ray Client
    dashboard: str  # for `ray job submit`
    session: Path  # Ray's folder for it: logs, metrics, service discovery


@contextlib.contextmanager
def head(
    *, cpus: int, env: dict[str, str], python: str = sys.executable, workers: int | None = None
) -> Iterator[Head]:
    """`ray start --head` with so many logical CPUs.

    Args:
        workers: so many nodes of 2 CPUs may an autoscaler add; None: there is no autoscaler.
    """
    gcs, dashboard, client = free_ports(3)
    more = [
        "--head",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
    ]
    # A short path: Ray's sockets are in it, whose paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="rp-")
    if workers is not None:
        config = Path(folder) / "autoscaling.yaml"
        config.write_text(json.dumps(autoscaling(f"127.0.0.1:{gcs}", workers)))
        more.append(f"--autoscaling-config={config}")
        env = env | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    try:
        with started(
            *more, f"--temp-dir={folder}", cpus=cpus, env=env, python=python, folder=folder
        ) as process:
            wait_for(lambda: answers(dashboard), process)
            yield Head(
                address=f"127.0.0.1:{gcs}",
                client=f"ray://127.0.0.1:{client}",
                dashboard=f"http://127.0.0.1:{dashboard}",
                session=Path(folder) / "session_latest",
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def autoscaling(address: str, workers: int) -> dict[str, Any]:
    """An autoscaler's settings with which it starts raylets on this machine.

    Ray's AutoscalingCluster would end all Rays of the machine first (`ray stop --force`).
    """
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": workers,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": workers},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in (*lists, "worker_start_ray")},
    }


@contextlib.contextmanager
def node(
    head: Head,
    *,
    cpus: int,
    env: dict[str, str],
    python: str = sys.executable,
    before: Sequence[str] = (),
) -> Iterator[subprocess.Popen]:
    """Add a node to `head`'s cluster; `kill_all` removes it. `before`: a command that starts it.

    One at a time: of two that start together on a machine, one takes the other's files.
    """
    more = (f"--address={head.address}",)
    with started(*more, cpus=cpus, env=env, python=python, folder=".", before=before) as process:
        assert process.stdout is not None
        said: list[str] = []
        while not said or "runtime started" not in said[-1]:
            said.append(process.stdout.readline())
            assert said[-1], "".join(said)
        yield process


@contextlib.contextmanager
def started(
    *more: str, cpus: int, env: dict[str, str], python: str, folder: str, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen]:
    """`ray start` with ports of its own."""
    # One that is not among `more`: these were free a moment ago too.
    agent = next(port for port in free_ports(5) if not any(f"={port}" in one for one in more))
    command = [
        *before,
        python,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        f"--num-cpus={cpus}",
        f"--memory={64 * 10**9}",
        "--disable-usage-stats",
        "--include-log-monitor=False",  # 1 s of CPU a node
        *more,
    ]
    command += [f"--dashboard-agent-listen-port={agent}"]
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        kill_all(process)


def answer_of(url: str, *, token: str = "a" * 32) -> Any:
    """What one of Ray's servers answers: JSON, or a text."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read().decode()
        return json.loads(text) if "json" in answer.headers["Content-Type"] else text


def listed_actors(head: Head, env: dict[str, str]) -> list[dict[str, Any]]:
    """The actors of the cluster that live, as `ray list actors` has them."""
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "list",
        "actors",
        "--address",
        head.dashboard,
        "--format",
        "json",
    ]
    listed = subprocess.run(
        [*command, "--filter", "state=ALIVE"], env=env, capture_output=True, text=True, timeout=120
    )
    assert listed.returncode == 0, listed.stderr
    return json.loads(listed.stdout)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL it and all below it."""
    below = (
        [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        if process.poll() is None
        else []
    )
    for each in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(timeout=20)
    if process.stdout is not None:
        process.stdout.close()
