"""Nodes that are lost, join and leave while a run goes on, on clusters of several raylets."""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raypipe.data import journal
from raypipe.data.location import Location
from raypipe.images import catalog
from tests.conftest import files
from tests.support.clusters import Head, answer_of, head, kill_all, node
from tests.support.driving import AROUND, driven, given_of, waiting_recipe
from tests.support.runs import plain_loop, running, settings

IMAGES = 300
"""Minutes of work, until a test is done with the run: the rest then takes seconds."""


def nodes_of(record: dict[str, Any]) -> dict[str, int]:
    """The actors on each node."""
    return {node["name"]: sum(node["actors"].values()) for node in record["nodes"]}


def all_run(record: dict[str, Any], **counts: int) -> bool:
    """Whether so many actors of each stage run, and no other starts or goes."""
    return running(record) == {name: (count, 0, 0) for name, count in counts.items()}


def equals_a_plain_loop(given: dict[str, Any], out: Path, tmp_path: Path, monkeypatch) -> None:
    """Check that the output is that of a plain loop, byte for byte, and that each row is in the
    journal once."""
    monkeypatch.setitem(catalog.RECIPES, "waits", waiting_recipe(given["there"]))
    known = {key: value for key, value in given.items() if key not in ("there", "output", "run_id")}
    plain_loop(settings(**known), tmp_path / "plain")
    assert files(out) == files(tmp_path / "plain")
    place = Location.of(str(out))
    entries = journal.read_entries(place, sorted(journal.done_shards(place)))
    done = Counter(row.image_id for entry in entries for row in entry.written)
    assert len(done) == given["limit"] and set(done.values()) == {1}


@pytest.mark.soak
def test_a_lost_node_ends_nothing_and_nodes_that_come_are_used(tmp_path, monkeypatch):
    out, there = tmp_path / "out", tmp_path / "there"
    given = given_of(out, there, actors=2, writers=2, limit=IMAGES, run_id="nodes")
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(head(cpus=0, env=AROUND))
        env = AROUND | {"RAY_ADDRESS": cluster.address}

        def add() -> subprocess.Popen:
            return stack.enter_context(node(cluster, cpus=2, env=AROUND))

        with driven(given, env) as run:
            # The head has no CPUs, and no other node is there yet.
            assert "no autoscaler adds nodes here" in run.says("Waiting for 2 of 2 CPUs")
            add()
            second = add()
            record = run.until(lambda r: r["done"] > 0 and all_run(r, preprocess=2, write=2))
            # Spread, and nothing on the head.
            assert sorted(nodes_of(record).values()) == [2, 2]
            assert record["waiting"] is None and record["actors_at_most"] == 4
            kill_all(second)
            # Ray notices after seconds. Then each stage keeps an actor, and images come out.
            run.until(lambda r: r["actors_at_most"] == 2)
            record = run.until(lambda r: all_run(r, preprocess=1, write=1))
            assert "Waiting for 2 of 4 CPUs" in record["waiting"]
            before = record["done"]
            record = run.until(lambda r: r["done"] > before + 4)
            assert len(nodes_of(record)) == 1
            assert "The run goes on with 2" in run.says("Waiting for 2 of 4 CPUs")
            third = add()
            record = run.until(lambda r: all_run(r, preprocess=2, write=2))
            assert len(nodes_of(record)) == 2 and record["waiting"] is None
            # More than all nodes have room for is refused, with the room of now.
            assert "there is room for 4" in run.scale(preprocess=3)
            kill_all(third)
            run.until(lambda r: r["actors_at_most"] == 2)
            record = run.until(lambda r: all_run(r, preprocess=1, write=1))
            changes = {(e["stage"], e["from"], e["to"], e["by"]) for e in record["scale_events"]}
            assert {("preprocess", 2, 1, "cluster"), ("write", 1, 2, "cluster")} <= changes
        # The driver was killed. The same command goes on with what there is, and says so.
        with driven(given, env) as again:
            assert "room for 2 of the 4 actors asked for" in again.says("actors asked for")
            again.until(lambda r: r["done"] > 0 and all_run(r, preprocess=1, write=1))
            add()
            again.until(lambda r: all_run(r, preprocess=2, write=2))
            there.touch()
            report = again.ended()
    assert report["images_out"] == IMAGES and len(report["nodes"]) == 2
    equals_a_plain_loop(given, out, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_node_that_is_drained_is_left_without_a_repeated_shard(tmp_path, monkeypatch):
    out, there, images = tmp_path / "out", tmp_path / "there", 150
    given = given_of(out, there, actors=2, writers=0, limit=images, run_id="drained")
    # The head has CPUs too. Actors are put on it only where there is no other room.
    with head(cpus=2, env=AROUND) as cluster, node(cluster, cpus=1, env=AROUND):
        env = AROUND | {"RAY_ADDRESS": cluster.address}
        with node(cluster, cpus=1, env=AROUND), driven(given, env) as run:
            record = run.until(lambda r: r["done"] > 0 and all_run(r, **{"preprocess+write": 2}))
            assert list(nodes_of(record).values()) == [1, 1]
            (leaves, _) = nodes_of(record)
            drain(cluster, leaves.split()[-1])
            record = run.until(
                lambda r: leaves not in nodes_of(r) and all_run(r, **{"preprocess+write": 2})
            )
            assert record["waiting"] is None and record["done"] < images
            there.touch()
            report = run.ended()
            # What the last seconds did is in the metrics of the nodes, though the run is over.
            assert done_by_metrics(cluster) == images
            jobs = [job["metadata"] or {} for job in answer_of(f"{cluster.dashboard}/api/jobs/")]
            assert [job["raypipe_run"] for job in jobs if "raypipe_run" in job] == ["drained"]
    # What was done twice would count twice here.
    assert [stage["images"] for stage in report["stages"]] == [images]
    assert report["images_out"] == images and len(report["nodes"]) == 3
    equals_a_plain_loop(given, out, tmp_path, monkeypatch)


def drain(cluster: Head, node: str) -> None:
    """Tell the node whose id starts with `node` that it will go, as after a spot notice."""
    known = answer_of(f"{cluster.dashboard}/api/v0/nodes")["data"]["result"]["result"]
    (whole,) = (one["node_id"] for one in known if one["node_id"].startswith(node))
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--address", cluster.address, "--node-id", whole]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    done = subprocess.run(command, env=AROUND, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def done_by_metrics(cluster: Head) -> float:
    """The images of all runs, of all nodes that live."""
    groups = json.loads((cluster.session / "prom_metrics_service_discovery.json").read_text())
    targets = [target for group in groups for target in group["targets"]]
    texts = [answer_of(f"http://{target}/metrics") for target in targets]
    done = re.compile(r"^ray_raypipe_run_images_done_total{.* (\S+)$", re.MULTILINE)
    return sum(float(number) for text in texts for number in done.findall(text))


@pytest.mark.soak
def test_an_autoscaler_is_asked_for_what_a_run_wants_and_no_longer_than_it_lasts(tmp_path):
    there = tmp_path / "there"
    given = given_of(tmp_path / "out", there, actors=2, writers=1, limit=IMAGES, run_id="grows")
    # No node is there, and 2 of 2 CPUs may come.
    with head(cpus=0, env=AROUND, workers=2) as cluster:
        env = AROUND | {"RAY_ADDRESS": cluster.address}
        with driven(given, env) as run:
            said = run.says("Waiting for 2 of 2 CPUs")
            assert "the autoscaler is asked for them" in said
            record = run.until(lambda r: r["done"] > 0 and all_run(r, preprocess=2, write=1))
            assert record["actors_at_most"] == 4
            refused = run.scale(preprocess=4)
            assert "5 actors, but there is room for 4" in refused
            assert "with all nodes that its autoscaler may add" in refused
            assert run.scale(preprocess=3) == {"preprocess": 3, "write": 1}
            run.until(lambda r: all_run(r, preprocess=3, write=1))
            assert ASKED in status(cluster.address, env)
            there.touch()
            report = run.ended()
        assert report["images_out"] == IMAGES and len(report["nodes"]) == 2
        ends = time.monotonic() + 60
        while ASKED in (said := status(cluster.address, env)):
            assert time.monotonic() < ends, said


ASKED = "from request_resources()"
"""What `ray status` says after each kind of resource that somebody asks for."""


def status(address: str, env: dict[str, str]) -> str:
    """What `ray status` says."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
