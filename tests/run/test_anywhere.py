"""Jobs and looks from machines that have nothing of a cluster, and to nodes that lack raypipe."""

import json
import signal
import subprocess
import sys
import time

import pytest
from ray._private.utils import check_version_info

from raypipe.run.cluster import joining
from tests.conftest import ROOT, files
from tests.support.clusters import environment, free_ports, head, kill_all, node

CLI = [sys.executable, "-m", "raypipe.cli"]
ALONE = ["unshare", "--pid", "--fork", "--mount-proc"]
"""Begins a command that sees no other process, as on a machine of its own."""


@pytest.mark.soak  # minutes on a busy machine
def test_a_cluster_without_raypipe_is_used_watched_and_scaled_from_anywhere(bare_python, tmp_path):
    """One cluster for all of it: two nodes take 20 s of CPU to start."""
    token = environment(PYTHONPATH=str(ROOT), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32)
    of_nodes = {key: value for key, value in token.items() if key != "PYTHONPATH"}

    def raypipe(*arguments: str, env: dict[str, str] = token, alone: bool = False):
        # Not in a folder with raypipe: Ray lets nodes of the same machine import from there.
        return subprocess.run(
            [*(ALONE if alone else ()), *CLI, *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def said(done: subprocess.CompletedProcess, status: int) -> str:
        assert done.returncode == status, done
        assert "Traceback" not in done.stdout + done.stderr
        return " ".join((done.stdout + done.stderr).split())

    with (
        head(cpus=2, env=of_nodes, python=bare_python) as cluster,
        node(cluster, cpus=2, env=of_nodes, python=bare_python),
    ):
        joins = token | {"RAY_ADDRESS": cluster.address}
        job = ["preprocess", "--input", "demo:2000", "--output", str(tmp_path / "out")]
        job += ["--actors", "1", "--writers", "0", "--shard-rows", "2", "--read-ms", "400"]
        run = subprocess.Popen(
            [*CLI, *job, "--run-id", "far"],
            cwd=tmp_path,
            env=joins,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            while not any((tmp_path / "out").glob("_raypipe/journal/*.json")):
                assert run.poll() is None, run.communicate()
                time.sleep(0.1)
            listed = raypipe("runs", "--json", f"--address={cluster.dashboard}", alone=True)
            assert json.loads(listed.stdout)["run_id"] == "far", listed
            assert listed.stderr == ""
            scaled = raypipe("scale", "preprocess=3", "--address", cluster.dashboard, alone=True)
            assert "preprocess=3 wanted" in said(scaled, 0)

            far = said(raypipe("runs", "--address", cluster.address, alone=True), 2)
            assert "this machine is none of its nodes" in far and "http://HOST:8265" in far
            wrong = token | {"RAY_AUTH_TOKEN": "b" * 32}
            for address in (cluster.address, cluster.dashboard):
                there = said(raypipe("runs", "--address", address, env=wrong), 2)
                assert "does not take the token in RAY_AUTH_TOKEN" in there, address
            nobody = said(raypipe("runs", "--address", f"http://127.0.0.1:{free_ports(1)[0]}"), 2)
            assert "No job server answers" in nobody
            submit = raypipe(*job[:3], env=token | {"RAY_ADDRESS": cluster.dashboard})
            assert "a job server" in said(submit, 2) and "ray job submit" in said(submit, 2)

            run.send_signal(signal.SIGINT)
            out, _ = run.communicate(timeout=300)
            assert run.returncode == 130 and "Interrupted" in out, out
            assert len(files(tmp_path / "out")) > 1
        finally:
            kill_all(run)

        # A node that lacks more than raypipe.
        (tmp_path / "lacks").mkdir()
        (tmp_path / "lacks/cv2.py").write_text("raise ImportError('none', name='cv2')")
        poor = ("env", f"PYTHONPATH={tmp_path / 'lacks'}")
        with node(cluster, cpus=1, env=of_nodes, python=bare_python, before=poor):
            while nodes(cluster, token) < 3:
                time.sleep(0.5)
            lacking = raypipe(*job[:3], "--output", str(tmp_path / "none"), env=joins)
            assert "1 of the cluster's 3 nodes cannot do this job: no cv2" in said(lacking, 2)
            assert not (tmp_path / "none").exists()


def nodes(cluster, env: dict[str, str]) -> int:
    """Living nodes of the cluster."""
    code = "import ray; ray.init(log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return int(done.stdout)


def test_another_version_is_named_with_both():
    there = {"ray_version": "2.9.0", "python_version": "3.9.1"}
    with pytest.raises(RuntimeError) as caught:
        check_version_info(there, "node 10.0.0.1")
    for job in (True, False):
        said = str(joining.refusal("10.0.0.1:6379", caught.value, job=job))
        assert "has Ray 2.9.0 and Python 3.9.1, and this is Ray 2." in said
        assert ("ray job submit" if job else "http://HOST:8265") in said


def test_an_address_that_a_job_cannot_use_is_refused_before_anything_is_asked():
    for address in ("http://10.0.0.1:8265", "https://head", "ray://10.0.0.1:10001"):
        with pytest.raises(Exception, match="ray job submit"):
            joining.check_address(address, job=True)


def test_rays_own_words_for_a_machine_that_is_no_node_are_understood():
    words = RuntimeError("No node info found matching attributes: '' when trying to resolve node")
    assert "this machine is none of its nodes" in str(joining.refusal("h:1", words, job=True))


@pytest.mark.soak  # a cluster of its own
def test_a_head_without_raypipes_dependencies_is_told_in_a_line(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError('no tyro here', name='tyro')")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32}
    with head(cpus=1, env=environment(PYTHONPATH=str(tmp_path), **token)) as cluster:
        done = subprocess.run(
            [*CLI, "runs", "--address", cluster.dashboard],
            cwd=ROOT,
            env=environment(**token),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not run on the head" in done.stderr and "no tyro here" in done.stderr
    assert "raypipe manifest dockerfile" in done.stderr and "Traceback" not in done.stderr
