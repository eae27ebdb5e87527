"""Nodes that are lost, join and leave while a run goes on, on clusters of several raylets."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raypipe.data import journal
from raypipe.data.location import Location
from raypipe.images import catalog
from tests.conftest import ROOT, files
from tests.support.clusters import environment, head, kill_all, node
from tests.support.driving import driven, waiting_recipe
from tests.support.runs import plain_loop, running, settings

AROUND = environment(
    PYTHONPATH=str(ROOT),
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN="a" * 32,
    # A lost node is noticed sooner.
    RAY_health_check_period_ms="1000",
    RAY_health_check_failure_threshold="3",
)


def nodes_of(record: dict[str, Any]) -> dict[str, int]:
    """The actors on each node."""
    return {node["name"]: sum(node["actors"].values()) for node in record["nodes"]}


def all_run(record: dict[str, Any], **counts: int) -> bool:
    """Whether so many actors of each stage run, and no other starts or goes."""
    return running(record) == {name: (count, 0, 0) for name, count in counts.items()}


def equals_a_plain_loop(given: dict[str, Any], out: Path, tmp_path: Path, monkeypatch) -> None:
    """Check that the output is that of a plain loop, byte for byte, and that each row is in the
    journal once."""
    waiting_recipe(given["there"])
    monkeypatch.setitem(catalog.RECIPES, "waits", catalog.RECIPES["waits"])
    known = {key: value for key, value in given.items() if key not in ("there", "output", "run_id")}
    plain_loop(settings(**known), tmp_path / "plain")
    assert files(out) == files(tmp_path / "plain")
    place = Location.of(str(out))
    entries = journal.read_entries(place, sorted(journal.done_shards(place)))
    done = Counter(row.image_id for entry in entries for row in entry.written)
    assert len(done) == given["limit"] and set(done.values()) == {1}


@pytest.mark.slow
def test_a_lost_node_ends_nothing_and_nodes_that_come_are_used(tmp_path, monkeypatch):
    out, there = tmp_path / "out", tmp_path / "there"
    given: dict[str, Any] = {
        "input": "demo:3000",
        "output": str(out),
        "recipe": "waits",
        "there": str(there),
        "actors": 2,
        "writers": 2,
        "limit": 600,
        "shard_rows": 2,
        "run_id": "nodes",
    }
    with head(cpus=0, env=AROUND) as cluster, node(cluster, cpus=2, env=AROUND) as first:
        env = AROUND | {"RAY_ADDRESS": cluster.address}
        with node(cluster, cpus=2, env=AROUND) as second, driven(given, env) as run:
            record = run.until(lambda r: r["done"] > 0 and all_run(r, preprocess=2, write=2))
            # Spread, and nothing on the head.
            assert sorted(nodes_of(record).values()) == [2, 2]
            assert record["waiting"] is None and record["actors_at_most"] == 4
            kill_all(second)
            # Ray notices after seconds. Then each stage keeps an actor, and images come out.
            record = run.until(lambda r: r["actors_at_most"] == 2)
            record = run.until(lambda r: all_run(r, preprocess=1, write=1))
            assert "Waiting for 2 of 4 CPUs" in record["waiting"]
            assert len(nodes_of(record)) == 1
            before = record["done"]
            run.until(lambda r: r["done"] > before + 4)
            assert "The run goes on with 2" in run.says("Waiting for 2 of 4 CPUs")
            with node(cluster, cpus=2, env=AROUND) as third:
                record = run.until(lambda r: all_run(r, preprocess=2, write=2))
                assert len(nodes_of(record)) == 2 and record["waiting"] is None
                # More than all nodes have room for is refused, with the room of now.
                assert "there is room for 4" in run.scale(preprocess=3)
                kill_all(third)
                run.until(lambda r: r["actors_at_most"] == 2)
                run.until(lambda r: all_run(r, preprocess=1, write=1))
            changes = [(e["stage"], e["from"], e["to"], e["by"]) for e in run.live["scale_events"]]
            assert set(changes) == {
                ("preprocess", 2, 1, "cluster"),
                ("write", 2, 1, "cluster"),
                ("preprocess", 1, 2, "cluster"),
                ("write", 1, 2, "cluster"),
            }
        # The driver was killed. The same command goes on with what there is, and says so.
        with driven(given, env) as again:
            said = again.says("asked for")
            assert "room for 2 of the 4 actors asked for" in said
            again.until(lambda r: r["done"] > 0 and all_run(r, preprocess=1, write=1))
            with node(cluster, cpus=2, env=AROUND):
                again.until(lambda r: all_run(r, preprocess=2, write=2))
                there.touch()
                report = again.ended()
        assert report["images_out"] == 600 and len(report["nodes"]) == 2
        assert report["hardware"]["nodes"] == 2
        kill_all(first)
    equals_a_plain_loop(given, out, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_node_that_is_drained_is_left_without_a_repeated_shard(tmp_path, monkeypatch):
    out, there = tmp_path / "out", tmp_path / "there"
    given: dict[str, Any] = {
        "input": "demo:3000",
        "output": str(out),
        "recipe": "waits",
        "there": str(there),
        "actors": 2,
        "writers": 0,
        "limit": 300,
        "shard_rows": 2,
        "run_id": "drained",
    }
    # The head has CPUs too. Actors are put on it only where there is no other room.
    with head(cpus=2, env=AROUND) as cluster, node(cluster, cpus=1, env=AROUND):
        env = AROUND | {"RAY_ADDRESS": cluster.address}
        with node(cluster, cpus=1, env=AROUND), driven(given, env) as run:
            record = run.until(lambda r: r["done"] > 0 and all_run(r, **{"preprocess+write": 2}))
            assert list(nodes_of(record).values()) == [1, 1]
            (leaves, _) = nodes_of(record)
            drain(cluster.address, leaves.split()[-1], env)
            record = run.until(
                lambda r: leaves not in nodes_of(r) and all_run(r, **{"preprocess+write": 2})
            )
            assert record["waiting"] is None and record["done"] < 300
            there.touch()
            report = run.ended()
    # What was done twice would count twice here.
    assert [stage["images"] for stage in report["stages"]] == [300]
    assert report["images_out"] == 300 and len(report["nodes"]) == 3
    equals_a_plain_loop(given, out, tmp_path, monkeypatch)


def drain(address: str, node: str, env: dict[str, str]) -> None:
    """Tell the node whose id starts with `node` that it will go, as after a spot notice."""
    code = (
        "import sys, ray; ray.init(address=sys.argv[1], logging_level='ERROR');"
        "print([n['NodeID'] for n in ray.nodes() if n['NodeID'].startswith(sys.argv[2])][0])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, address, node], env=env, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address]
    command += ["--node-id", found.stdout.strip(), "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "spot", "--deadline-remaining-seconds", "600"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
