import io
import tarfile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data import sizes
from raypipe.data.listing import list_images
from raypipe.data.work import make_work, shards
from raypipe.images.catalog import get
from raypipe.images.ops.augment import HorizontalFlip
from raypipe.images.ops.geometry import Resize
from raypipe.images.recipe import Recipe

FLIP = Recipe(name="flip", ops=(HorizontalFlip(),))
SIDES = [200, 1200, 300, 2500, 100, 2000, 2000, 150, 400, 1500]


def encoded(side: int, extension: str) -> bytes:
    return cv2.imencode(extension, np.full((side, side, 3), side % 256, np.uint8))[1].tobytes()


def parts(
    input: str, *, memory: int, rows: int | None = None, recipe: Recipe = FLIP
) -> list[list[str]]:
    source = list_images(input)
    cut = sizes.cut(recipe, images=source.num_rows, rows=rows, backend="opencv", memory=memory)
    return [
        shard.column("image_id").to_pylist() for shard in shards(make_work(source, **cut.arguments))
    ]


def folder(tmp_path, extension: str) -> str:
    for number, side in enumerate(SIDES):
        (tmp_path / f"{number}{extension}").write_bytes(encoded(side, extension))
    return str(tmp_path)


def tar(tmp_path, extension: str) -> str:
    with tarfile.open(tmp_path / "all.tar", "w") as file:
        for number, side in enumerate(SIDES):
            data = encoded(side, extension)
            info = tarfile.TarInfo(f"{number}{extension}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(tmp_path / "all.tar")


@pytest.mark.parametrize("place", [folder, tar])
@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp", ".tif"])
def test_shards_of_local_files_fit_into_memory_by_their_headers(tmp_path, place, extension):
    input = place(tmp_path, extension)
    assert [len(shard) for shard in parts(input, memory=10**9, rows=100)] == [10]
    tight = parts(input, memory=48_000_000, rows=100)
    assert len(tight) > 1 and sum(map(len, tight)) == 10
    for shard in tight:
        pixels = [SIDES[int(name[0])] ** 2 for name in shard]
        assert len(shard) == 1 or 3 * sum(pixels) + 3 * max(pixels) <= 48_000_000


def test_images_that_will_be_rejected_weigh_nothing(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(encoded(100, ".png"))
    assert parts(str(tmp_path), memory=10**8) == [["a.jpg", "b.jpg", "c.png"]]


def test_raw_pixels_in_parquet_are_of_the_size_that_their_columns_say(tmp_path):
    columns = {
        "image": [bytes(side * side * 3) for side in SIDES],
        "height": pa.array(SIDES, pa.int32()),
        "width": pa.array(SIDES, pa.int32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert len(parts(str(tmp_path / "a.parquet"), memory=10**9, rows=100)) == 1
    assert len(parts(str(tmp_path / "a.parquet"), memory=60_000_000, rows=100)) > 3


def test_encoded_bytes_of_which_no_more_is_known_count_twenty_bytes_each(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    data = cv2.imencode(".jpg", noise)[1].tobytes()
    pq.write_table(pa.table({"image": [data] * 100}), tmp_path / "a.parquet")
    each = 20 * len(data)
    lengths = [
        len(shard) for shard in parts(str(tmp_path / "a.parquet"), memory=24 * each, rows=100)
    ]
    assert set(lengths[:-1]) <= {18, 19, 20, 21}, lengths


def test_recipes_of_one_size_are_cut_by_it_and_refused_where_one_result_is_too_much(tmp_path):
    large = Recipe(name="large", ops=(Resize(height=5000, width=5000),))
    (tmp_path / "a.png").write_bytes(encoded(10, ".png"))
    cut = sizes.cut(large, images=1000, rows=None, backend="opencv", memory=1_750_000_000)
    assert cut.rows == 11 and cut.need == 11 * 75_000_000
    again = sizes.cut(large, images=1000, rows=500, backend="opencv", memory=1_750_000_000)
    assert again.rows == 11
    with pytest.raises(
        UsageError,
        match=r"large makes images of 5000x5000, 0\.07 GB each, and an actor has 0\.10 GB",
    ):
        sizes.cut(large, images=1000, rows=None, backend="opencv", memory=100_000_000)


def test_random_recipes_are_cut_for_the_largest_that_may_be_drawn(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number}.png").write_bytes(encoded(500, ".png"))
    assert (
        len(parts(str(tmp_path / "in"), memory=10**10, rows=100, recipe=get("torchvision-ssd")))
        == 1
    )
    tight = parts(str(tmp_path / "in"), memory=400_000_000, rows=100, recipe=get("torchvision-ssd"))
    assert max(map(len, tight)) <= 400_000_000 // (16 * 3 * 500**2) and len(tight) < 40
