"""jobs/preprocess.py as a user runs it: with its own Ray, interrupted, killed, submitted."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest
import yaml
from ray.autoscaler._private.util import fillout_defaults, validate_config

from tests.conftest import ROOT, files
from tests.support.clusters import answer_of, environment, head, wait_for
from tests.support.runs import named, plain_loop, settings

JOB = [sys.executable, "jobs/preprocess.py"]


def job(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [*JOB, *map(str, arguments)]
    env = environment() if env is None else env
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def started_job(*arguments: str) -> subprocess.Popen:
    command = [*JOB, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_driver_that_is_interrupted_and_then_killed_goes_on_where_it_was(tmp_path, joined):
    out = tmp_path / "out"
    given = {"input": "demo:80", "output": out, "shard_rows": 4, "actors": 1, "writers": 1}
    flags = [
        word
        for name, value in given.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    before: dict[Path, int] = {}
    for how in (signal.SIGINT, signal.SIGKILL):
        done_before = done_in(out)
        # Each shard waits for a second, so the run is far from its end when it is ended.
        process = started_job(*flags, "--read-ms", "250")
        wait_for(lambda enough=done_before + 12: done_in(out) >= enough, process)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if named(child, "ray::MapWor")]
        assert workers
        os.kill(process.pid, how)
        printed, errors = process.communicate(timeout=300)
        if how == signal.SIGINT:
            assert (process.returncode, printed) == (130, "")  # and nothing of Ray's
            assert "Interrupted. The same command goes on from there" in errors
            assert "Traceback" not in errors
        # Ray's agents notice within a minute that their raylet is gone. No writer may be left
        # when the next run starts.
        _, alive = psutil.wait_procs(workers, timeout=120)
        assert not alive, f"left running: {alive}"
        if done_before:
            assert f"Going on: {done_before} of 80 images are done already" in errors
        untouched = [path for path, when in before.items() if path.stat().st_mtime_ns == when]
        assert len(untouched) >= done_before
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    done_before = done_in(out)
    assert 0 < done_before < 80

    # Who writes decides nothing of the results: a run may be finished in the other form.
    assert flags[-2:] == ["--writers", "1"]
    again = job(*flags[:-1], "0", env=joined)
    assert again.returncode == 0, again.stderr
    assert f"Going on: {done_before} of 80 images are done already" in again.stderr
    plain_loop(settings(**given), tmp_path / "plain")
    undisturbed = files(tmp_path / "plain")
    assert files(out) == undisturbed
    journaled = [
        row["file"]
        for path in out.glob("_raypipe/journal/*.json")
        for row in json.loads(path.read_text())["written"]
    ]
    assert sorted(journaled) == sorted(undisturbed)
    untouched = [path for path, when in before.items() if path.stat().st_mtime_ns == when]
    assert len(untouched) >= done_before
    assert not list((out / "_raypipe").glob("tmp/*"))


def done_in(out: Path) -> int:
    """Images of the journal's entries, of 4 rows each."""
    return 4 * len(list(out.glob("_raypipe/journal/*.json")))


def test_bad_arguments_end_with_status_2_and_one_clear_line(tmp_path):
    for arguments in (
        ["--input", "no/such/folder"],
        ["--input", "demo", "--actors", "many"],
        ["--no-such-flag"],
    ):
        done = job(*arguments)
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr
        assert arguments[-1] in done.stderr


@pytest.fixture
def cluster(bare_python):
    """`ray start --head` with token authentication, and an environment for it."""
    env = environment(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32, RAY_JOB_STOP_WAIT_TIME_S="60"
    )  # a slow machine is no defect
    env.pop("PYTHONPATH", None)
    env["PATH"] = f"{Path(bare_python).parent}:{env['PATH']}"  # `python` of a job's command line
    with head(cpus=4, env=env, python=bare_python) as started:
        yield started, env


@pytest.mark.slow
def test_ray_job_submit_with_nothing_of_raypipe_on_the_nodes(cluster, tmp_path):
    started, env = cluster

    def ray_job(*arguments: str) -> subprocess.CompletedProcess:
        command = ["ray", "job", arguments[0], "--address", started.dashboard, *arguments[1:]]
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
        )

    def submit(*arguments: str, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        return ray_job(
            "submit", *more, "--working-dir", ".", "--", "python", "jobs/preprocess.py", *arguments
        )

    out = tmp_path / "out"
    asked = (
        "--input",
        "demo:60",
        "--output",
        str(out),
        "--actors",
        "1",
        "--writers",
        "1",
        "--shard-rows",
        "5",
    )
    stopped = submit(*asked, "--store-ms", "400", more=("--no-wait", "--submission-id", "stopped"))
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    ended = time.monotonic() + 300
    while len(list(out.glob("_raypipe/journal/*.json"))) < 2:
        assert time.monotonic() < ended, ray_job("logs", "stopped").stdout
        time.sleep(0.1)
    stopping = ray_job("stop", "stopped")
    assert "was stopped" in stopping.stdout + stopping.stderr, stopping
    said = " ".join(answer_of(f"{started.dashboard}/api/jobs/stopped/logs")["logs"].split())
    assert "Interrupted. The same command goes on from there" in said and "Traceback" not in said
    before = 5 * len(list(out.glob("_raypipe/journal/*.json")))
    assert 0 < before < 60

    done = submit(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Going on: {before} of 60 images are done already" in " ".join(done.stdout.split())
    assert "60 images in = 60 out + 0 rejected" in done.stdout
    assert len(list(out.glob("*.jpg"))) == 60

    no_token = environment(RAY_ADDRESS=started.address)
    unknown = subprocess.run(
        [*JOB, "--input", "demo:60"],
        cwd=ROOT,
        env=no_token,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert unknown.returncode == 2
    assert "wants a token, and none was sent" in " ".join(unknown.stderr.split())


def test_cluster_yaml_is_what_ray_up_takes():
    text = (ROOT / "cluster.yaml").read_text()
    config = yaml.safe_load(text)
    validate_config(fillout_defaults(config))
    kinds = config["available_node_types"]
    workers = {name: kind for name, kind in kinds.items() if name != config["head_node_type"]}
    assert kinds[config["head_node_type"]]["resources"]["CPU"] == 0
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=~]", each)[0] for each in needed}
    common = " ".join(config["setup_commands"])
    of_gpu = " ".join(kinds["gpu"]["worker_setup_commands"])
    assert {name for name in names if name not in common} == {"torch", "torchvision"}
    assert {name for name in names if name not in of_gpu} == set()
    assert "torchvision" in " ".join(config["head_setup_commands"])
    assert all(kind["min_workers"] <= kind["max_workers"] for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= config["max_workers"]
    # Some workers are no spot instances; all reach buckets, from an image that is not Ray's own.
    spot = {
        name for name, kind in workers.items() if "InstanceMarketOptions" in kind["node_config"]
    }
    assert spot and any(kind["min_workers"] for name, kind in workers.items() if name not in spot)
    for kind in kinds.values():
        assert {"ImageId", "IamInstanceProfile"} <= kind["node_config"].keys()
    # Ray opens SSH to everybody in groups that it makes; the one that is named exists before.
    group = config["provider"]["security_group"]
    assert group == {"GroupName": "raypipe"} and "--port 22 --cidr MY-ADDRESS/32" in text
    for command in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "--metrics-export-port=8080" in command[-1]


def test_the_google_cloud_block_of_cluster_yaml_is_what_ray_up_takes_too():
    text = (ROOT / "cluster.yaml").read_text()
    block = text[text.index("# provider:") : text.index("# The image decides")]
    google = yaml.safe_load(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
    config = yaml.safe_load(text) | {name: google[name] for name in ("provider", "auth")}
    for kind in config["available_node_types"].values():
        kind["node_config"] = google["node_config"]
    validate_config(fillout_defaults(config))
    assert {"machineType", "disks", "serviceAccounts"} <= google["node_config"].keys()
