"""The train stage without Ray: batches, schedule, and workers as plain processes."""

import json
import os
import threading
from contextlib import nullcontext
from dataclasses import replace

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from raypipe import UsageError
from raypipe.data.batches import batches, rows_of, trainable
from raypipe.data.listing import list_images
from raypipe.data.reader import Reader
from raypipe.data.tables import BLOCK, SOURCE, WORK, lists
from raypipe.data.work import make_work
from raypipe.images.ops.augment import HorizontalFlip, PhotometricDistort
from raypipe.images.ops.geometry import CenterCrop, Resize
from raypipe.images.ops.random_geometry import IoUCrop, ZoomOut
from raypipe.images.recipe import Finish, Recipe
from raypipe.models import checkpoint as checkpoints
from raypipe.models.detection import Classes
from raypipe.models.placer import Placer
from raypipe.stages.planning import Preprocessing
from raypipe.stages.preprocess import preprocess_shard
from raypipe.train.clock import lr_factor
from raypipe.train.epochs import Segment
from raypipe.train.feed import Feed
from raypipe.train.peers import Peers
from raypipe.train.plan import Assignment, Training
from raypipe.train.settings import Learning, Model
from raypipe.train.worker import Worker
from tests.support.forks import forks
from tests.support.training import Quiet


def block(epoch: int, numbers, *, size=(4, 6), rejected=(), boxes=1) -> pa.Table:
    """A block of images, each filled with its number, which is also its place in the epoch."""
    numbers, rows = list(numbers), []
    for number in numbers:
        bad = number in rejected
        rows.append(
            {
                "epoch": epoch,
                "shard": 1000 * epoch + numbers[0],
                "image_id": f"i{number}",
                "name": f"i{number}",
                "uri": f"/i{number}",
                "height": None if bad else size[0],
                "width": None if bad else size[1],
                "image": None if bad else np.full((*size, 3), number % 256, np.uint8).tobytes(),
                "reason": "truncated" if bad else None,
                "detail": None,
                "boxes": [[0.0, 0.0, 2.0, 2.0]] * (number % 3 if boxes is None else boxes),
                "labels": [5] * (number % 3 if boxes is None else boxes),
                "crowds": [],
                "annotation_ids": [],
            }
        )
    return pa.Table.from_pylist(rows, schema=BLOCK)


def ids(batch) -> list[str]:
    return [row.image_id for row in batch.rows]


def test_batches_keep_the_order_fill_up_across_blocks_and_never_span_epochs():
    made = list(batches([block(0, range(5)), block(0, range(5, 7)), block(1, range(3))], 3))
    assert [(batch.epoch, ids(batch)) for batch in made] == [
        (0, ["i0", "i1", "i2"]),
        (0, ["i3", "i4", "i5"]),
        (0, ["i6"]),
        (1, ["i0", "i1", "i2"]),
    ]
    assert all(
        (row.pixels == int(row.image_id[1:])).all() and row.pixels.shape == (4, 6, 3)
        for b in made
        for row in b.rows
    )


def test_rejected_rows_ride_along_without_filling_a_batch():
    made = list(batches([block(0, range(7), rejected=(1, 2, 6))], 2))
    assert [ids(batch) for batch in made] == [["i0", "i1", "i2", "i3"], ["i4", "i5"], ["i6"]]
    assert [len(batch.good) for batch in made] == [2, 2, 0]
    assert made[2].rows[0].reject == {
        "image_id": "i6",
        "uri": "/i6",
        "reason": "truncated",
        "detail": "",
    }


def test_slices_and_joined_blocks_are_read_like_whole_ones():
    whole = block(0, range(9), rejected=(4,))
    for table in (whole.slice(3, 4), pa.concat_tables([whole.slice(3, 2), whole.slice(5, 2)])):
        rows = list(rows_of(table))
        assert [row.image_id for row in rows] == ["i3", "i4", "i5", "i6"]
        assert [None if row.pixels is None else int(row.pixels.mean()) for row in rows] == [
            3,
            None,
            5,
            6,
        ]


def test_an_epoch_that_comes_after_a_later_one_is_an_error():
    with pytest.raises(ValueError, match="epoch 0 came after one of epoch 1"):
        list(batches([block(1, [1]), block(0, [2])], 4))


def test_boxes_without_an_area_are_not_learned_and_boxes_without_labels_are_refused():
    (row,) = rows_of(block(0, [3], boxes=3))
    row = replace(
        row,
        boxes=np.float32([[0, 0, 2, 2], [1, 1, 1, 3], [0, 0, 4, 4]]),
        crowds=np.array([False, False, True]),
    )
    boxes, labels = trainable(row)
    # A crowd among them: the recipe has left it there to be learned from.
    assert boxes.tolist() == [[0, 0, 2, 2], [0, 0, 4, 4]] and labels.tolist() == [5, 5]
    with pytest.raises(UsageError, match="i3 has 3 boxes, but 0 labels"):
        trainable(replace(row, labels=np.array([], np.int64)))


def test_a_batch_is_finished_on_the_device_and_ragged_ones_keep_their_own_sizes():
    (batch,) = batches([block(0, [10]), block(0, [20], size=(5, 3))], 2)
    finish = Finish(scale=1 / 2, mean=(1.0, 2.0, 3.0), channels="bgr", layout="hwc")
    for multiple in (None, 8):
        placed = Placer(torch.device("cpu"), replace(finish, pad_multiple=multiple), Classes((5,)))(
            batch
        )
        assert [tuple(image.shape) for image in placed.images] == [(3, 4, 6), (3, 5, 3)]
        assert placed.images[0][:, 0, 0].tolist() == [4.0, 3.0, 2.0]
        assert placed.images[1][:, 4, 2].tolist() == [9.0, 8.0, 7.0]
    assert placed.targets[1]["labels"].tolist() == [1]


def test_ops_that_are_left_to_the_device_give_what_the_actors_would_have_given(tmp_path):
    paths, rng = [], np.random.default_rng(3)
    for number, size in enumerate([(90, 120), (90, 120), (64, 200), (90, 120)]):
        paths.append(tmp_path / f"{number}.png")
        cv2.imwrite(
            str(paths[-1]), cv2.GaussianBlur(rng.integers(0, 256, (*size, 3), np.uint8), (0, 0), 2)
        )
    source = list_images(str(tmp_path))
    boxes = [np.float32([[5, 5, 40, 50], [60, 20, 110, 60]])] * 4
    for name, values in (("boxes", boxes), ("labels", [np.array([5, 7])] * 4)):
        source = source.set_column(
            source.column_names.index(name),
            SOURCE.field(name),
            lists(values, SOURCE.field(name).type),
        )
    shard = make_work(source, rows_per_shard=4)
    resized = Resize(height=48, width=64, antialias=True)
    chance = Recipe(
        name="chance",
        ops=(PhotometricDistort(), ZoomOut(), IoUCrop(), HorizontalFlip(), resized),
        finish=FINISH,
    )
    for recipe in (
        chance,
        Recipe(name="plain", ops=(resized,), finish=FINISH),
        Recipe(name="ragged", ops=(HorizontalFlip(),)),
    ):
        made = []
        for left in (None, recipe):
            pixels = Preprocessing(
                recipe=recipe, backend="torchvision", seed=4, decode_only=left is not None
            )
            block_, _ = preprocess_shard(shard, pixels, reader=Reader(threads=0))
            (batch,) = batches([block_], 4)
            made.append(
                Placer(torch.device("cpu"), FINISH, Classes((5, 7)), left=left, seed=4)(batch)
            )
        there, here = made
        assert there.batch.good[2].pixels.shape == (
            (48, 64, 3) if recipe.name != "ragged" else (64, 200, 3)
        )
        assert here.batch.good[2].pixels.shape == (64, 200, 3)
        for one, other in zip(
            there.images + there.targets, here.images + here.targets, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    # A crop that does not fit is found where the image is decoded, and costs its row.
    cropping = Preprocessing(
        recipe=Recipe(name="c", ops=(CenterCrop(height=80, width=80),)),
        backend="opencv",
        decode_only=True,
    )
    block_, _ = preprocess_shard(shard, cropping, reader=Reader(threads=0))
    assert block_.column("reason").to_pylist() == [None, None, "too small", None]


def test_the_learning_rate_warms_up_and_falls():
    cosine = [lr_factor(done, schedule="cosine", warmup=0.1) for done in (0, 0.05, 0.1, 0.55, 1.0)]
    assert cosine == pytest.approx([0.001, 0.5, 1.0, 0.5, 0.0], abs=1e-9)
    step = [
        lr_factor(done, schedule="step", warmup=0.0) for done in (0, 0.66, 0.67, 0.88, 0.89, 1.0)
    ]
    assert step == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_what_goes_wrong_ahead_is_raised_where_batches_are_taken():
    def broken():
        yield from batches([block(0, range(2))], 2)
        raise OSError("the store is gone")

    feed = Feed(broken(), Placer(torch.device("cpu"), Finish(), Classes((5,))), torch.device("cpu"))
    assert ids(feed.peek().batch) == ids(feed.take().batch) == ["i0", "i1"]
    with pytest.raises(OSError, match="the store is gone"):
        feed.peek()


# --- workers


FINISH = Finish(scale=1 / 255)


def assignment(folder: str, *, rows: int, epochs: int, board=None, **training) -> Assignment:
    given = {
        "model": "tests.models.toy:Toy",
        "batch_size": 4,
        "optimizer": "sgd",
        "lr": 0.05,
        "warmup": 0.0,
        "clip": 0.0,
        "epochs": epochs,
    } | training
    mine = {"learning": Learning, "model": Model}
    groups = {
        group: kind(**{k: v for k, v in given.items() if k in kind.__dataclass_fields__})
        for group, kind in mine.items()
    }
    known = {name for kind in mine.values() for name in kind.__dataclass_fields__}
    others = {name: value for name, value in given.items() if name not in known}
    return Assignment(
        training=Training(
            classes=Classes((5,)),
            finish=FINISH,
            rows=rows,
            decides={"count": 1000},
            **groups,
            **others,
        ),
        settings={},
        attempt=folder,
        resume=None,
        segment=segment_of([], epochs),
        holdout=[],
        board=board or Quiet(),
        meter=Quiet(),
        row_log=os.path.join(folder, "log"),
    )


def segment_of(blocks: list[pa.Table], epochs: int) -> Segment:
    """What `blocks` of all ranks are of."""
    places, left = {}, dict.fromkeys(range(epochs), 0)
    for one in blocks:
        numbers = [int(image_id[1:]) for image_id in one.column("image_id").to_pylist()]
        places[one.column("shard")[0].as_py()] = [(numbers[0], numbers[-1] + 1)]
        left[one.column("epoch")[0].as_py()] += len(numbers)
    return Segment(epochs=range(epochs), work=WORK.empty_table(), places=places, left=left)


def train(
    given: Assignment, blocks, rank: int = 0, size: int = 1, report=lambda metrics, name: None
) -> Worker:
    if size == 1:
        epochs = given.training.learning.epochs
        given = replace(given, segment=segment_of(blocks, epochs))
    worker = Worker(
        given,
        device=torch.device("cpu"),
        peers=Peers(rank, size),
        blocks=blocks,
        holdout=[],
        report=report,
    )
    worker.run()
    return worker


def in_process(rank: int, size: int, folder: str, blocks: list, given: Assignment) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    train(given, blocks, rank, size)
    dist.destroy_process_group()


def logged(folder) -> dict[int, list[str]]:
    """The image ids of each step, all ranks together, in their order."""
    steps: dict[int, list[str]] = {}
    for path in sorted((folder / "log").iterdir()):
        for line in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(line["step"], []).extend(
                f"{line['epoch']}/{i}" for i in line["image_ids"]
            )
    return steps


@pytest.mark.slow
def test_uneven_workers_neither_hang_nor_drop_a_row_and_give_the_gradient_of_all_images_together(
    tmp_path,
):
    # Each rank has 2 images of a step while both have rows: 9 + 3 in one epoch, 2 + 7 in the next.
    mine = [[block(0, range(9), boxes=None), block(1, range(2), boxes=None)]]
    mine += [
        [block(0, range(9, 12), boxes=None, rejected=(10,)), block(1, range(2, 9), boxes=None)]
    ]
    given = replace(
        assignment(str(tmp_path), rows=21, epochs=2), segment=segment_of([*mine[0], *mine[1]], 2)
    )
    context = forks(__name__)
    processes = [
        context.Process(target=in_process, args=(rank, 2, str(tmp_path), mine[rank], given))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    steps = logged(tmp_path)
    assert sorted(i for step in steps.values() for i in step) == sorted(
        [f"0/i{n}" for n in range(12)] + [f"1/i{n}" for n in range(9)]
    )
    assert len(steps) == 5 + 4  # as many as the longer rank needs in each epoch

    weights, done = torch.tensor([0.1, -0.2, 0.3]), 0
    velocity = torch.zeros(3)
    for step in sorted(steps):
        numbers = [int(i.split("/i")[1]) for i in steps[step] if i != "0/i10"]
        means = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 3) / 255
        error = means @ weights - torch.tensor([n % 3 for n in numbers])
        gradient = (2 * error[:, None] * means).mean(dim=0) + 5e-4 * weights
        velocity = 0.9 * velocity + gradient
        weights = weights - 0.05 * lr_factor(done / 21, schedule="cosine", warmup=0.0) * velocity
        done += len(steps[step])
    kept = checkpoints.load(checkpoints.all_in(str(tmp_path))[-1])
    torch.testing.assert_close(kept.state["model"]["weights"], weights)
    assert (
        kept.progress.rows,
        kept.progress.images,
        kept.progress.rejected,
        kept.progress.epoch,
    ) == (21, 20, 1, 2)
    assert [row["image_id"] for row in kept.progress.rejects] == ["i10"]


def test_a_checkpoint_within_an_epoch_has_the_places_of_the_rows_that_were_seen(tmp_path):
    names: list[str] = []
    given = assignment(str(tmp_path), rows=11, epochs=1, checkpoint_every=1)
    train(
        given, [block(0, range(11), rejected=(2,))], report=lambda metrics, name: names.append(name)
    )
    assert (
        len(names) == len(set(names)) == 4
    )  # Ray Train deletes by name: the end of the epoch is not its last step
    found = [checkpoints.load(folder) for folder in checkpoints.all_in(str(tmp_path))]
    assert [(one.seen["epoch"], one.seen["seen"]) for one in found] == [
        (0, [[0, 5]]),
        (0, [[0, 9]]),
        (1, []),
        (1, []),
    ]
    assert [one.progress.rows for one in found] == [5, 9, 11, 11]
    assert [one.progress.epoch for one in found] == [0, 0, 0, 1]


def test_a_loss_that_is_no_number_ends_the_training_and_is_not_kept(tmp_path):
    with pytest.raises(UsageError, match=r"loss became (nan|inf).*Lower --lr \(it is 1e\+30\)"):
        train(
            assignment(str(tmp_path), rows=40, epochs=1, lr=1e30, checkpoint_every=1),
            [block(0, range(40))],
        )
    for folder in checkpoints.all_in(str(tmp_path)):
        assert torch.isfinite(checkpoints.load(folder).state["model"]["weights"]).all()


def test_a_last_batch_of_one_image_is_trained_on_although_it_has_no_statistics(tmp_path):
    given = assignment(str(tmp_path), rows=3, epochs=1, model="ssd_tiny", batch_size=2)
    worker = train(given, [block(0, range(3), size=(64, 64))])
    assert sorted(i for step in logged(tmp_path).values() for i in step) == ["0/i0", "0/i1", "0/i2"]
    assert all(module.training for module in worker._model.modules())


@pytest.mark.parametrize("lr", [0.05, 1e30])
def test_the_feeding_thread_ends_with_the_training_and_also_when_that_breaks_off(tmp_path, lr):
    before = {thread for thread in threading.enumerate() if thread.name == "raypipe-feed"}
    with nullcontext() if lr < 1 else pytest.raises(UsageError):
        train(
            assignment(str(tmp_path), rows=400, epochs=1, lr=lr, checkpoint_every=1),
            [block(0, range(400))],
        )
    for thread in {
        thread for thread in threading.enumerate() if thread.name == "raypipe-feed"
    } - before:
        thread.join(10)
        assert not thread.is_alive()


def test_an_epoch_without_a_box_to_learn_from_ends_the_training(tmp_path):
    def without(name: str, value) -> pa.Table:
        table = block(0, range(6))
        values = lists([value] * 6, BLOCK.field(name).type)
        return table.set_column(table.column_names.index(name), BLOCK.field(name), values)

    for number, blocks in enumerate(
        [
            [block(0, range(6), rejected=range(6))],
            [without("boxes", np.float32([[3, 3, 3, 9]]))],
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UsageError, match="Epoch 0 had no box to learn from"):
            train(assignment(str(folder), rows=6, epochs=1), blocks)
        assert checkpoints.all_in(str(folder)) == []


def test_dropped_boxes_and_frames_are_counted_once_however_many_epochs(tmp_path):
    def told(epoch: int) -> pa.Table:
        table = block(epoch, range(4))
        dropped = [
            [{"box": [0, 0, 0, 1], "annotation_id": n, "reason": "no area"}] * (n % 2)
            for n in range(4)
        ]
        columns = {
            "boxes_dropped": dropped,
            "boxes_from": ["stored", "upright", "unclear", None],
            "detail": ["libjpeg: premature end", None, None, None],  # damaged, but kept
        }
        for name, values in columns.items():
            field = BLOCK.field(name)
            table = table.set_column(
                table.column_names.index(name), field, pa.array(values, field.type)
            )
        return table

    worker = train(
        assignment(str(tmp_path), rows=8, epochs=2, checkpoint_every=1), [told(0), told(1)]
    )
    progress = checkpoints.load(checkpoints.all_in(str(tmp_path))[-1]).progress
    assert progress == worker._progress
    assert [(box["image_id"], box["annotation_id"]) for box in progress.dropped] == [
        ("i1", 1),
        ("i3", 3),
    ]
    assert progress.boxes_from == {"stored": 1, "upright": 1, "unclear": 1}
    assert progress.damaged == 2  # of images_out, which counts each epoch
