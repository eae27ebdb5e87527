"""Half an hour in which anything may be killed at any time: the results are those of a plain loop.

pytest -m soak tests/run/test_soak.py    # RAYPIPE_SOAK_S=300: five minutes
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pyarrow.fs
import pytest

from raypipe.data.location import Location
from raypipe.images import catalog
from tests.conftest import files
from tests.support.clusters import free_ports, head, kill_all, node
from tests.support.driving import AROUND as CLUSTER
from tests.support.driving import Driven, driven, given_of, waiting_recipe
from tests.support.runs import named, plain_loop, settings

SECONDS = float(os.environ.get("RAYPIPE_SOAK_S", "1800"))
EVERY_S = 12.0
"""Between two kills: Ray notices a lost node after a few seconds."""

IMAGES = int(3 * SECONDS)
"""Three actors do up to 3 images a second, as long as images wait."""

STAGES = {"actor": "Preprocess", "writer": "Write"}

AROUND = CLUSTER | {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}

RELAY = """
import asyncio, sys

async def main():
    async def meet(reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))

        async def pass_on(source, sink):
            try:
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            finally:
                sink.close()

        await asyncio.gather(pass_on(reader, back), pass_on(there, writer), return_exceptions=True)

    server = await asyncio.start_server(meet, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
"""


class Relay:
    """Stands before a server that keeps its data in memory. Without it the server is away."""

    def __init__(self, to: int):
        (self.port,) = free_ports(1)
        self._to = to
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", RELAY, str(self.port), str(self._to)]
        self._process = subprocess.Popen(command)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Machines:
    """A cluster of a head without CPUs and three nodes of two, any of which may be killed."""

    def __init__(self, stack: contextlib.ExitStack):
        self._stack = stack
        self.head = stack.enter_context(head(cpus=0, env=AROUND))
        self.nodes = [self._new() for _ in range(3)]

    def _new(self) -> subprocess.Popen:
        return self._stack.enter_context(node(self.head, cpus=2, env=AROUND))

    def lose_one(self, chance: random.Random) -> None:
        at = chance.randrange(len(self.nodes))
        kill_all(self.nodes[at])
        time.sleep(chance.uniform(0, 2 * EVERY_S))
        self.nodes[at] = self._new()

    def kill_actor(self, chance: random.Random, name: str) -> None:
        below = [p for one in self.nodes for p in psutil.Process(one.pid).children(recursive=True)]
        if actors := [process for process in below if named(process, name)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(actors).kill()


@contextlib.contextmanager
def one_driver(given: dict[str, Any], machines: Machines) -> Iterator[Driven]:
    env = AROUND | {"RAY_ADDRESS": machines.head.address}
    with driven(given, env) as run:
        yield run


@pytest.mark.soak
def test_whatever_is_killed_the_results_are_those_of_a_plain_loop(s3, tmp_path, monkeypatch):
    chance = random.Random(int(os.environ.get("RAYPIPE_SOAK_SEED", "1")))
    there = tmp_path / "there"
    relay = Relay(int(s3.rpartition(":")[2]))
    query = f"scheme=http&endpoint_override=127.0.0.1:{relay.port}&region=us-east-1"
    output = f"s3://soak/out?{query}&allow_bucket_creation=true"
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "any")
    system, _ = Location.of(output).filesystem()
    system.create_dir("soak")
    given = given_of(
        output,
        there,
        input=f"demo:{IMAGES}",
        actors=3,
        writers=2,
        run_id="soak",
        max_reject_fraction=0.0,
    )
    ends = time.monotonic() + SECONDS
    killed: dict[str, int] = {}
    reports: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        machines = Machines(stack)
        while not reports:
            with one_driver(given, machines) as run:
                while run.process.poll() is None:
                    if time.monotonic() > ends:
                        there.touch()
                        time.sleep(0.5)
                        continue
                    time.sleep(chance.uniform(0.5, 1.5) * EVERY_S)
                    kind = chance.choice(("actor", "actor", "writer", "node", "driver", "store"))
                    killed[kind] = killed.get(kind, 0) + 1
                    if kind in ("actor", "writer"):
                        name = "ray::MapWorker(MapBatches(" + kind.capitalize().replace(
                            "Actor", "P"
                        )
                        machines.kill_actor(chance, name)
                    elif kind == "node":
                        machines.lose_one(chance)
                    elif kind == "store":
                        relay.end()
                        time.sleep(chance.uniform(1, 25))
                        relay.start()
                    else:
                        break
                if run.process.poll() == 0:
                    reports.append(run.ended())
                elif run.process.poll() is not None:
                    print(f"driver ended with {run.process.returncode}: {run.said[-3:]}")
    print(f"killed in {SECONDS:.0f} s: {killed}")
    assert reports[0]["images_out"] == IMAGES and reports[0]["images_rejected"] == 0
    monkeypatch.setitem(catalog.RECIPES, "waits", waiting_recipe(str(there)))
    known = {key: given[key] for key in ("input", "recipe", "shard_rows")}
    plain_loop(settings(**known), tmp_path / "plain")
    try:
        assert stored(output) == files(tmp_path / "plain")
    finally:
        relay.end()


def stored(output: str) -> dict[str, bytes]:
    """The result files in the store, by their relative path."""
    system, path = Location.of(output).filesystem()
    found = system.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    names = [one.path for one in found if one.is_file and "/_raypipe/" not in one.path]
    result = {}
    for name in names:
        with system.open_input_stream(name) as stream:
            result[name.removeprefix(f"{path}/")] = stream.read()
    return result
