"""`raypipe.loader`: batches for a loop of one's own."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import ray
import torch
from ray.data import DataContext

import raypipe
from raypipe import UsageError
from raypipe.data.reader import Reader
from raypipe.data.work import make_work, order_of, shards
from raypipe.images import catalog
from raypipe.images import torchvision as on_torch
from raypipe.stages.preprocess import preprocess_shard
from raypipe.train.loading import plan
from raypipe.train.position import Position
from raypipe.train.settings import LoaderSettings
from tests.conftest import ROOT, jpeg
from tests.support.clusters import environment
from tests.support.runs import named, quiet

FAST = {"actors": 1, "shard_rows": 7, "recipe": "coco-300"}


def loader(input: Path, **given) -> "raypipe.train.loader.Loader":
    return raypipe.loader(input, **{"console": quiet(), **FAST, **given})


def expected(input: Path, epoch: int, **given) -> tuple[list[str], np.ndarray]:
    """The ids and pixels of an epoch, by a plain loop over the same functions."""
    settings = LoaderSettings.of(**{"input": str(input), **FAST, **given})
    _, todo = plan(settings, ranks=1)
    source, seed = todo.epochs.source, todo.epochs.seed
    order = order_of(epoch, source.num_rows, seed=seed) if seed is not None else None
    rows = source if order is None else source.take(order)
    work = make_work(rows, rows_per_shard=10**6, epoch=epoch)
    (shard,) = shards(work)
    block, _ = preprocess_shard(shard, todo.pixels, reader=Reader())
    good = [row for row in block.to_pylist() if row["image"] is not None]
    pixels = [np.frombuffer(row["image"], np.uint8) for row in good]
    return [row["image_id"] for row in good], np.stack(pixels)


def taken(of) -> tuple[list[str], np.ndarray]:
    """The ids and pixels of a pass."""
    batches = list(of)
    ids = [image_id for batch in batches for image_id in batch.image_ids]
    return ids, torch.cat([batch.images for batch in batches]).flatten(1).numpy()


def test_a_pass_is_an_epoch_and_gives_what_a_plain_loop_gives(session, photos, tmp_path):
    (photos / "a" / "007.jpg").write_bytes(jpeg(7)[:400])
    report = tmp_path / "report"
    with loader(photos, batch_size=16, epochs=2, report=str(report)) as batches:
        assert (len(batches), batches.epoch) == (4, 0)
        first = list(batches)
        assert [len(batch) for batch in first] == [16, 16, 16, 11]
        assert {batch.images.dtype for batch in first} == {torch.uint8}
        assert first[0].images.shape == (16, 300, 300, 3)
        rejects = [reject for batch in first for reject in batch.rejects]
        assert [reject["image_id"] for reject in rejects] == ["a/007.jpg"]
        assert first[0].boxes[0].shape == (0, 4) and first[0].labels[0].shape == (0,)
        for epoch in range(2):
            ids, pixels = taken(first if epoch == 0 else batches)
            want_ids, want = expected(photos, epoch)
            assert ids == want_ids and (pixels == want).all()
        assert batches.epoch == 2
        assert list(batches) == []
    kept = json.loads((report / "report.json").read_text())
    assert kept == json.loads(json.dumps(batches.report))
    assert (kept["images_in"], kept["images_out"], kept["images_rejected"]) == (120, 118, 2)
    assert [stage["name"] for stage in kept["stages"]] == ["preprocess", "consume"]
    assert kept["stages"][1]["images"] == 120
    assert (report / "report.html").exists()
    with pytest.raises(UsageError, match="closed"):
        list(loader_again(batches))


def loader_again(batches):
    batches.load_state_dict(batches.state_dict() | {"epoch": 0})
    return batches


def test_a_state_goes_on_with_the_very_next_row(session, photos):
    """Taken after each step once; a fresh loader gives the rest of the epoch, and the next one."""
    (photos / "b" / "003.jpg").write_bytes(b"no image")
    given = {"batch_size": 9, "epochs": 2, "seed": 4, "limit": 30, "shard_rows": 4}
    whole, states = [], []
    with loader(photos, **given) as batches:
        for _ in range(2):
            for batch in batches:
                whole.append(batch.image_ids)
                states.append((batches.epoch, json.loads(json.dumps(batches.state_dict()))))
    assert [epoch for epoch, _ in states] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert len(json.dumps(states[2])) < 300
    with loader(photos, **given) as batches:
        for at in (2, 5, 0, 3, 7):  # within an epoch, back again, and after the last batch of one
            batches.load_state_dict(states[at][1])
            assert batches.epoch == states[at][0]
            rest = [batch.image_ids for _ in range(batches.epoch, 2) for batch in batches]
            assert rest == whole[at + 1 :]
        with pytest.raises(UsageError, match="seed 5 then, 4 now"):
            state = states[0][1]
            batches.load_state_dict(state | {"rows": state["rows"] | {"seed": 5}})


def test_a_slow_loop_may_pause_scale_and_leave_a_pass_early(session, photos, monkeypatch):
    """Ray Data ends an execution whose blocks nobody takes; not one of raypipe."""
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 1)
    seen = []
    with loader(photos, batch_size=5, shuffle=False, shard_rows=3) as batches:
        with pytest.raises(UsageError, match="no actors to scale"):
            batches.scale(preprocess=2)
        for batch in batches:
            seen += batch.image_ids
            time.sleep(0.3)
            if len(seen) == 10:
                time.sleep(3)
                with pytest.raises(UsageError, match="consume"):
                    batches.scale(consume=2)
                assert batches.scale(preprocess=2) == {"preprocess": 2}
            if len(seen) == 20:
                break
        for batch in batches:
            seen += batch.image_ids
            time.sleep(0.3)
    (event,) = batches.report["scale_events"]
    assert (event["stage"], event["to"]) == ("preprocess", 2)
    assert batches.report["stages"][-1]["busy"] > 0.5
    assert batches.report["verdict"]["stage"] == "consume"
    assert seen == sorted(seen, key=lambda one: one.split("/")) and len(set(seen)) == 60


def test_a_training_and_a_validation_loader_share_one_ray(session, photos):
    before = set(_preprocessing())
    training = loader(photos, batch_size=20, epochs=2, seed=1)
    validation = loader(photos, batch_size=30, epochs=2, shuffle=False, limit=30)
    for _ in range(training.epoch, 2):
        assert sum(len(batch) for batch in training) == 60
        assert sum(len(batch) for batch in validation) == 30
    training.close()  # the first that was opened, while the other is open
    validation.load_state_dict(validation.state_dict() | {"epoch": 1})
    assert sum(len(batch) for batch in validation) == 30
    with pytest.raises(UsageError, match=r"8 CPUs, one each, but the cluster has 7"):
        list(loader(photos, actors=8))
    validation.close()
    assert ray.is_initialized()  # the tests' own
    gone = time.monotonic() + 60
    while set(_preprocessing()) - before:
        assert time.monotonic() < gone
        time.sleep(0.2)


def _preprocessing() -> list[psutil.Process]:
    """The actors of this process's Ray."""
    children = psutil.Process().children(True)
    return [process for process in children if named(process, "ray::MapWorker")]


def test_batches_are_finished_on_the_device_and_transformed(session, photos):
    given = {"recipe": "imagenet-pytorch", "batch_size": 8, "limit": 20}
    with loader(photos, finish="device", **given) as batches:
        ready = list(batches)
    asked = []
    with loader(
        photos, transform=lambda batch: asked.append(batch) or len(batch), **given
    ) as plain:
        assert list(plain) == [8, 8, 4]
    for batch, raw in zip(ready, asked, strict=True):
        assert batch.images.dtype == torch.float32 and batch.images.shape[1:] == (3, 224, 224)
        finish = catalog.get("imagenet-pytorch").finish
        assert torch.equal(batch.images, on_torch.finish(raw.images, finish))
    assert raw.to("cpu").image_ids == raw.image_ids


def test_images_of_different_sizes_come_as_a_list_with_their_boxes(session):
    with loader("demo:12", recipe="torchvision-hflip", batch_size=5) as batches:
        first = next(iter(batches))
    assert isinstance(first.images, list) and len(first.images) == len(first.boxes) == 5
    for image, boxes, labels in zip(first.images, first.boxes, first.labels, strict=True):
        height, width, _ = image.shape
        assert len(boxes) == len(labels) > 0
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()


def test_the_largest_row_counts_where_results_differ_in_size(tmp_path):
    """Its bytes are known once rows were weighed, which is when the first shards are cut."""
    cv2.imwrite(str(tmp_path / "large.png"), np.zeros((6000, 5000, 3), np.uint8))
    settings = LoaderSettings.of(input=str(tmp_path), recipe="torchvision-hflip", epochs=1)
    _, todo = plan(settings, ranks=1)
    before = todo.shard_bytes
    todo.epochs.next(Position(), ranks=1)
    assert todo.shard_bytes >= before + 6000 * 5000 * 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batchsize": 4}, "no setting 'batchsize'; did you mean 'batch_size'"),
        ({"resume": False}, "no setting 'resume'"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"finish": "gpu"}, "finish is 'gpu'.*device"),
        ({"device": "cpu"}, "device is 'cpu'.*finish="),
        ({"finish": "device", "device": "cuda:77"}, "device 'cuda:77' cannot be used here"),
        ({"backend": "pillow"}, "backend is 'pillow'; it must be 'opencv' or 'torchvision'"),
        ({"equal": "drop", "batch_size": 61}, "has 60 images, and each of 1 ranks needs a batch"),
        ({"recipe": "ssd-300-train"}, "has boxes, which recipe"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_starts(photos, given, said):
    with pytest.raises(UsageError, match=said):
        loader(photos, **given)


def test_processes_that_cannot_talk_are_refused(photos, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, but torch.distributed is not init"):
        loader(photos)


LOOP = """
import json, sys, time
import raypipe
from tests.support.runs import quiet

loader = raypipe.loader(
    sys.argv[1], recipe="coco-1200", batch_size=5, shard_rows=5, epochs=100, actors=1,
    report=sys.argv[2], console=quiet(),
)

def made():
    return max([stage.images for stage in loader._supply.control.look().stages] or [0])

def wait_until_no_more_is_made():
    seen, since = made(), time.monotonic()
    while time.monotonic() < since + 4:
        time.sleep(0.2)
        if made() > seen:
            seen, since = made(), time.monotonic()
    print(seen, flush=True)

try:
    for epoch in range(100):
        for batch in loader:
            if len(sys.argv) == 3:
                wait_until_no_more_is_made()
                sys.argv.append("waited")
            # In one write, which Ctrl-C cannot cut.
            sys.stdout.write(" ".join([str(epoch), *batch.image_ids]) + "\\n")
            sys.stdout.flush()
except KeyboardInterrupt:
    print("state", json.dumps(loader.state_dict()), flush=True)
    print(loader.epoch, *next(iter(loader)).image_ids, flush=True)
    sys.exit(3)
"""


@pytest.mark.slow
def test_a_slow_loop_holds_little_and_ctrl_c_loses_no_batch(photos, tmp_path):
    """With a Ray of its own, which ends with the process, though nobody calls close."""
    store = 150_000_000  # bytes, of which an image takes 4,320,000
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(photos), str(tmp_path / "report")],
        cwd=ROOT,
        env=environment(RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES=str(store)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    made = int(process.stdout.readline())
    lines = [process.stdout.readline() for _ in range(17)]
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=120)
    assert process.returncode == 3, said
    # The loop waited at its first batch until actors made no more: of 6,000 images, those that fit
    # into the store, and those of three batches.
    assert 15 <= made <= store / 4_320_000 + 15
    assert rest.count("state ") == 1, (rest, said)
    before, after = rest.split("state ")
    state, next_batch = after.splitlines()[:2]
    given = [line.split() for line in (*lines, *before.splitlines(), next_batch)]
    at, last = json.loads(state), int(given[-1][0])
    images = Counter((line[0], image_id) for line in given for image_id in line[1:])
    assert max(images.values()) == 1 and at["epoch"] == last
    # Ctrl-C may come when the loop has got a batch, and has not told of it yet.
    told = 60 * last + sum(stop - start for start, stop in at["seen"]) + 5
    assert told - images.total() in (0, 5)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["images_in"] == told
    psutil.wait_procs(children, timeout=60)
    assert not [child for child in children if child.is_running() and child.status() != "zombie"]
