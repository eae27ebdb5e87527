"""One loader over several ranks: processes as torchrun starts them, and workers of Ray Train."""

import contextlib
import random
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import ray.train
from ray.train.torch import TorchTrainer

from raypipe import UsageError
from raypipe.train.loader import _check_hosts
from raypipe.train.peers import Peers
from tests.support.looping import images, logged, loop, started
from tests.support.runs import named

GIVEN = {"recipe": "coco-300", "actors": 1, "shard_rows": 5, "epochs": 2, "seed": 3}


@pytest.fixture
def folder(session, photos, tmp_path) -> Path:
    """Of a loop's logs. One of the 60 photos is no image."""
    (photos / "a" / "004.jpg").write_bytes(b"no image")
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def all_images(epochs: int = 2) -> Counter:
    every = {f"{sub}/{number:03d}.jpg" for sub in "ab" for number in range(30)} - {"a/004.jpg"}
    return Counter((epoch, image) for epoch in range(epochs) for image in every)


def test_one_rank_then_two_then_one_give_each_image_once(folder, joined, photos):
    given = {"input": str(photos), "given": {**GIVEN, "batch_size": 6}}
    loop(**given, folder=str(folder), stop=3)
    processes = started(folder, joined, ranks=2, **given, attempt=1, stop=4)
    # A rank that stops in mid-epoch may end with another status than 0 once its loop is done
    # (raypipe/train/README.md).
    for process in processes:
        process.wait(240)
    loop(**given, folder=str(folder), attempt=2)
    steps = logged(folder)
    assert [len(of) for of in steps][:3] == [3, 4, 4]
    assert images(steps) == all_images()
    rejects = Counter(r["image_id"] for of in steps for step in of for r in step["rejects"])
    assert rejects == {"a/004.jpg": 2}


def killed(folder: Path, environment: dict[str, str], photos: Path, kills: list[str]) -> None:
    """Train to the end while one process after the other is killed, and check what was given."""
    rng = random.Random(",".join(kills))
    given = {**GIVEN, "batch_size": 3, "epochs": 1 + len(kills) // 2}
    arguments = {"input": str(photos), "given": given}
    processes: list = []
    attempt = -1
    for kill in kills:
        if not processes:
            attempt += 1
            ranks = 2 if "rank" in kill else 1
            processes = started(
                folder, environment, ranks=ranks, **arguments, attempt=attempt, pause_s=0.05
            )
        log = folder / f"log-{attempt}-0.jsonl"
        _wait_for_steps(log, more=rng.randint(1, 5), processes=processes)
        if kill.startswith("actor"):
            if actors := _actors(processes):
                with contextlib.suppress(psutil.NoSuchProcess):
                    rng.choice(actors).kill()
            continue
        rng.choice(processes).kill()
        for process in processes:  # as torchrun does
            process.kill()
            process.wait()
        processes = []
    for process in processes:
        process.kill()
        process.wait()
    loop(**arguments, folder=str(folder), attempt=attempt + 1)
    assert images(logged(folder)) == all_images(given["epochs"])


def _actors(processes: list) -> list[psutil.Process]:
    """The preprocess actors, once there is one again; none if the loop was faster."""
    ended = time.monotonic() + 60
    while True:
        found = [p for p in psutil.Process().children(True) if named(p, "ray::MapWorker")]
        if found or any(process.poll() is not None for process in processes):
            return found
        assert time.monotonic() < ended
        time.sleep(0.05)


def _wait_for_steps(log: Path, *, more: int, processes: list) -> None:
    def steps() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    begun, ended = steps(), time.monotonic() + 240
    while steps() < begun + more:
        assert all(process.poll() in (None, 0) for process in processes)
        if any(process.poll() == 0 for process in processes):  # it was faster
            return
        assert time.monotonic() < ended
        time.sleep(0.02)


def test_whoever_is_killed_each_image_is_given_once(folder, joined, photos):
    killed(folder, joined, photos, ["actor", "loop", "actor with ranks", "rank", "loop"])


@pytest.mark.soak
def test_a_hundred_random_kills(folder, joined, photos):
    rng = random.Random(1)
    for batch in range(10):
        there = folder / str(batch)
        there.mkdir()
        kinds = ["actor", "loop", "rank", "actor with ranks"]
        killed(there, joined, photos, [rng.choice(kinds) for _ in range(10)])


def test_workers_of_ray_train_share_one_execution(folder, photos, tmp_path):
    """They hold two of the 8 CPUs: actors="auto" must leave these alone."""
    given = {**GIVEN, "actors": "auto", "batch_size": 8, "epochs": 1}

    def train(config: dict) -> None:
        loop(**config)

    TorchTrainer(
        train,
        train_loop_config={"input": str(photos), "given": given, "folder": str(folder)},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(name="loader", storage_path=str(tmp_path / "storage")),
    ).fit()
    steps = logged(folder)
    assert len(steps) == 2 and len(steps[0]) == len(steps[1])
    assert images(steps) == all_images(1)


def test_ranks_on_machines_that_are_no_cluster_are_refused():
    class TwoMachines(Peers):
        def exchange(self, item):
            return [("one", False), ("two", False)]

    with pytest.raises(UsageError, match=r"2 machines \(one, two\), which are no Ray cluster"):
        _check_hosts(TwoMachines(0, 1))
