"""`raypipe.loader`: batches for a loop of one's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import raypipe
from raypipe import UsageError
from raypipe.data.reader import Reader
from raypipe.data.work import make_work, order_of, shards
from raypipe.stages.preprocess import preprocess_shard
from raypipe.train.loading import plan
from raypipe.train.settings import LoaderSettings
from tests.conftest import jpeg
from tests.support.runs import quiet

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
    work = make_work(rows, rows_per_shard=10**6, first_epoch=epoch)
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
