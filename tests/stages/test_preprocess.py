import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raypipe.data.listing import list_images
from raypipe.data.reader import Reader
from raypipe.data.tables import BLOCK, SOURCE, images_of
from raypipe.data.work import make_work, requeued, shards
from raypipe.images import catalog, opencv
from raypipe.images.header import NO_ROOM, UNREAD, Reject
from raypipe.images.ops.augment import HorizontalFlip
from raypipe.images.ops.geometry import CenterCrop, Resize
from raypipe.images.recipe import Recipe
from raypipe.stages.planning import Preprocessing
from raypipe.stages.preprocess import Memory, pixels, preprocess_shard
from tests.conftest import jpeg


def shard_of(folder: Path) -> pa.Table:
    return make_work(list_images(str(folder)), rows_per_shard=1000)


def settings(recipe: Recipe | str = "coco-300") -> Preprocessing:
    return Preprocessing(
        recipe=catalog.get(recipe) if isinstance(recipe, str) else recipe, backend="opencv"
    )


def test_rows_stay_in_order_and_a_bad_one_has_a_reason_and_no_pixels(photos):
    (photos / "a" / "001.jpg").write_bytes(b"not a photo")
    (photos / "a" / "002.jpg").write_bytes(b"")
    shard = shard_of(photos)
    block, bytes_in = preprocess_shard(shard, settings(), reader=Reader())
    assert block.schema == BLOCK
    assert block.column("image_id").to_pylist() == shard.column("image_id").to_pylist()
    bad = {
        row["image_id"]: row["reason"]
        for row in block.drop_columns(["image"]).to_pylist()
        if row["reason"]
    }
    assert bad == {"a/001.jpg": "not an image", "a/002.jpg": "empty"}
    assert [p is None for p in block.column("image").to_pylist()] == [
        r is not None for r in block.column("reason").to_pylist()
    ]
    assert bytes_in == sum(path.stat().st_size for path in photos.rglob("*.jpg")) - len(
        b"not a photo"
    )


def test_damaged_images_are_rejected_or_kept(photos):
    whole = (photos / "a" / "001.jpg").read_bytes()
    (photos / "a" / "001.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    shard = shard_of(photos)
    for how, told in (("reject", ["damaged"]), ("keep", [])):
        block, _ = preprocess_shard(shard, replace(settings(), damaged=how), reader=Reader())
        assert [reason for reason in block.column("reason").to_pylist() if reason] == told
        details = [detail for detail in block.column("detail").to_pylist() if detail]
        assert details == ["libjpeg: Corrupt JPEG data: premature end of data segment"]
        assert block.column("image").null_count == len(told)


def test_labels_of_whole_images_stay_and_those_of_dropped_boxes_go():
    photo, boxed = jpeg(1), [[10.0, 10, 50, 50], [80, 60, 150, 110]]
    source = {
        "labels": [[7], [], [1, 2]],
        "boxes": [[], [], boxed],
        "crowds": [[], [], [False] * 2],
        "annotation_ids": [[], [], [5, 6]],
    }
    rows = [
        {
            "image_id": str(n),
            "name": str(n),
            "uri": str(n),
            "offset": 0,
            "length": -1,
            "frame": [0, 0],
        }
        for n in range(3)
    ]
    rows = [row | {name: source[name][n] for name in source} for n, row in enumerate(rows)]
    shard = make_work(pa.Table.from_pylist(rows, schema=SOURCE), rows_per_shard=3)

    class Given:
        def read(self, shard):
            return [photo] * 3

    # Of 120x160: the first box is outside.
    left = Recipe(name="left", ops=(CenterCrop(height=60, width=60),))
    block, _ = preprocess_shard(shard, settings(left), reader=Given())
    assert block.column("reason").to_pylist() == [None] * 3
    assert block.column("labels").to_pylist() == [[7], [], [2]]
    assert block.column("annotation_ids").to_pylist() == [[], [], [6]]


def annotated(folder: Path, *images: tuple[str, tuple[int, int], list[list[float]]]) -> pa.Table:
    """The work of a COCO JSON. Images: file, the JSON's size, boxes (x y width height)."""
    listed = [
        {"id": n, "file_name": file, "height": h, "width": w}
        for n, (file, (h, w), _) in enumerate(images)
    ]
    boxes = [(n, box) for n, (_, _, of) in enumerate(images) for box in of]
    found = [
        {"id": 10 + k, "image_id": n, "category_id": k, "bbox": box}
        for k, (n, box) in enumerate(boxes)
    ]
    (folder / "a.json").write_text(json.dumps({"images": listed, "annotations": found}))
    return make_work(
        list_images(str(folder), annotations=str(folder / "a.json")), rows_per_shard=100
    )


@pytest.mark.parametrize("decode_only", [False, True])
def test_boxes_drawn_in_another_frame_are_moved_into_the_picture(tmp_path, decode_only):
    picture = np.full((100, 200, 3), 70, np.uint8)
    picture[20:60, 30:110] = (220, 20, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.ascontiguousarray(np.rot90(picture))  # stored as 200x100
    Image.fromarray(turned).save(tmp_path / "rotated.jpg", exif=exif)
    Image.fromarray(picture).resize((400, 200)).save(tmp_path / "doubled.jpg")
    Image.fromarray(picture).save(tmp_path / "as is.jpg")
    exif[0x0112] = 3
    Image.fromarray(picture).save(tmp_path / "unclear.jpg", exif=exif)
    work = annotated(
        tmp_path,
        ("rotated.jpg", (200, 100), [[20, 90, 40, 80]]),
        ("doubled.jpg", (100, 200), [[30, 20, 80, 40]]),
        ("as is.jpg", (100, 200), [[30, 20, 80, 40]]),
        ("unclear.jpg", (100, 200), [[30, 20, 80, 40]]),
        ("as is.jpg", (100, 100), [[30, 20, 80, 40]]),
        ("as is.jpg", (100, 100), []),
    )
    block, _ = preprocess_shard(work, replace(settings(), decode_only=decode_only), reader=Reader())
    assert block.column("boxes_from").to_pylist() == [
        "stored",
        "scaled",
        "upright",
        "unclear",
        None,
        None,
    ]
    assert block.column("reason").to_pylist() == [None] * 4 + ["bad boxes", None]
    assert "100x100 (height x width), and this one has 100x200" in block.column("detail")[4].as_py()
    whole = [30, 20, 110, 60] if decode_only else [45, 60, 165, 180]
    expected = [[2 * side for side in whole] if decode_only and n == 1 else whole for n in range(4)]
    np.testing.assert_allclose(
        [boxes[0] for boxes in block.column("boxes").to_pylist()[:4]], expected, atol=1e-3
    )


def test_bad_boxes_are_dropped_with_the_reason_and_the_others_keep_their_labels(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))  # 120x160
    bad = [[30, 30, -10, 5], [0, 0, 1e999, 5], [500, 500, 10, 10], [5, 5, 0, 9]]
    work = annotated(tmp_path, ("a.jpg", (0, 0), [[10, 10, 20, 20], *bad, [100, 100, 90, 90]]))
    block, _ = preprocess_shard(work, settings(), reader=Reader())
    assert block.column("labels").to_pylist() == [[0, 5]] and block.column(
        "annotation_ids"
    ).to_pylist() == [[10, 15]]
    dropped = block.column("boxes_dropped").to_pylist()[0]
    assert [(one["annotation_id"], one["reason"]) for one in dropped] == [
        (11, "corners swapped"),
        (12, "not finite"),
        (13, "outside the image"),
        (14, "no area"),
    ]
    assert dropped[0]["box"] == [30, 30, 20, 35]


def test_pixels_of_one_size_are_one_array_without_a_copy(photos):
    block, _ = preprocess_shard(shard_of(photos), settings(), reader=Reader())
    array = pixels(block)
    assert (array.shape, array.dtype) == ((60, 300, 300, 3), np.uint8)
    buffer = block.column("image").chunk(0).buffers()[2]
    assert array.ctypes.data == buffer.address
    data = jpeg(2, height=102, width=152)
    from raypipe.images.decode import read_header

    header = read_header(data)
    plain = np.empty((300, 300, 3), np.uint8)
    opencv.execute(opencv.decode(data, header), catalog.get("coco-300").ops, plain)
    index = block.column("image_id").to_pylist().index("b/001.jpg")
    np.testing.assert_array_equal(array[index], plain)


def test_images_of_many_sizes_share_one_buffer_and_are_not_one_array(photos):
    block, _ = preprocess_shard(shard_of(photos), settings("mask-rcnn-train"), reader=Reader())
    sizes = set(
        zip(block.column("height").to_pylist(), block.column("width").to_pylist(), strict=True)
    )
    assert len(sizes) > 1 and all(min(size) == 800 or max(size) == 1333 for size in sizes)
    lengths = [len(image) for image in block.column("image").to_pylist()]
    assert lengths == [
        h * w * 3
        for h, w in zip(
            block.column("height").to_pylist(), block.column("width").to_pylist(), strict=True
        )
    ]
    with pytest.raises(ValueError, match="sizes"):
        pixels(block)


def test_pixels_of_a_slice_and_of_a_block_with_rejects(photos):
    (photos / "a" / "000.jpg").write_bytes(b"x")
    block, _ = preprocess_shard(shard_of(photos), settings(), reader=Reader())
    good = pixels(block)
    assert len(good) == 59
    part = block.slice(5, 10)
    np.testing.assert_array_equal(pixels(part)[0], good[4])
    images = images_of(block)
    assert images[0] is None and all(
        np.array_equal(image, of) for image, of in zip(images[1:], good, strict=True)
    )
    assert all(
        np.array_equal(image, of) for image, of in zip(images_of(part), good[4:14], strict=True)
    )
    assert images_of(block.slice(0, 1)) == [None] and images_of(block.slice(0, 0)) == []
    assert images_of(pa.concat_tables([block.slice(0, 3), block.slice(0, 2)]))[3] is None
    assert pixels(block.slice(0, 1)).shape[0] == 0


def test_memory_is_the_same_again_when_nobody_has_it_any_more():
    memory = Memory(1000)
    array = memory(600)
    address = array.ctypes.data
    view = array[20:30]
    del array
    assert memory(600).ctypes.data != address
    del view
    assert memory(1000).ctypes.data == address
    more = memory(5000)
    more.fill(7)
    memory(10).fill(8)
    assert len(more) == 5000 and (more == 7).all()


def test_a_block_that_is_kept_does_not_change_with_the_next_one(photos):
    shard, memory = shard_of(photos), Memory(60 * 300 * 300 * 3)
    fresh, _ = preprocess_shard(shard, settings(), reader=Reader())
    one, _ = preprocess_shard(shard, settings(), reader=Reader(), memory=memory)
    address = one.column("image").chunk(0).buffers()[2].address
    other, _ = preprocess_shard(shard.slice(30), settings(), reader=Reader(), memory=memory)
    assert one.equals(fresh) and other.equals(fresh.slice(30))
    del one, other
    again, _ = preprocess_shard(shard, settings(), reader=Reader(), memory=memory)
    assert again.column("image").chunk(0).buffers()[2].address == address and again.equals(fresh)


@dataclass(frozen=True, kw_only=True)
class FailAtTall:
    above: int = 150
    reject: bool = False


@opencv.apply.register
def _(op: FailAtTall, image, out=None):
    if image.shape[0] > op.above:
        raise (
            Reject("corrupt", "found in the op")
            if op.reject
            else ZeroDivisionError("a bug in the user's op")
        )
    return image


def test_an_op_that_raises_costs_its_own_image_only(photos):
    recipe = Recipe(name="own", ops=(FailAtTall(), Resize(height=50, width=50, antialias=False)))
    block, _ = preprocess_shard(shard_of(photos), settings(recipe), reader=Reader())
    reasons = block.column("reason").to_pylist()
    assert reasons.count("failed") == 9 and reasons.count(None) == 51  # heights are 100 to 159
    assert "ZeroDivisionError: a bug in the user's op" in block.column("detail").to_pylist()


def test_an_image_that_is_rejected_late_does_not_keep_the_memory(photos):
    ops = FailAtTall(reject=True), Resize(height=50, width=50, antialias=False)
    shard, memory = shard_of(photos), Memory(60 * 50 * 50 * 3)
    addresses = set()
    for _ in range(2):
        block, _ = preprocess_shard(
            shard, settings(Recipe(name="own", ops=ops)), reader=Reader(), memory=memory
        )
        assert block.column("detail").to_pylist().count("found in the op") == 9
        addresses.add(block.column("image").chunk(0).buffers()[2].address)
        del block
    assert len(addresses) == 1


def test_a_killer_is_not_touched_and_marks_say_where_a_process_is(photos):
    marks: list[int] = []
    block, _ = preprocess_shard(
        shard_of(photos),
        settings(),
        reader=Reader(),
        killers={3: Reject("kills its process")},
        mark=marks.append,
    )
    assert 3 not in marks and set(marks) == set(range(60)) - {3}
    assert block.column("reason").to_pylist()[3] == "kills its process"


AS_IT_IS = Recipe(name="as-it-is", ops=(HorizontalFlip(),))


def flat_png(side: int) -> bytes:
    return cv2.imencode(".png", np.full((side, side, 3), 7, np.uint8))[1].tobytes()


def shard_with(*images: bytes) -> tuple[pa.Table, Any]:
    rows = [
        {"image_id": str(n), "name": str(n), "uri": str(n), "offset": 0, "length": -1}
        for n in range(len(images))
    ]
    empty = {
        field.name: [0, 0] if field.name == "frame" else []
        for field in SOURCE
        if field.name not in rows[0]
    }
    shard = make_work(
        pa.Table.from_pylist([row | empty for row in rows], schema=SOURCE), rows_per_shard=len(rows)
    )

    class Given:
        def read(self, shard):
            return list(images)

    return shard, Given()


@pytest.mark.parametrize(
    ("recipe", "memory", "last"),
    [("coco-300", 75_000_000, (None, None)), (AS_IT_IS, 50_000_000, (UNREAD, NO_ROOM))],
)
def test_what_does_not_fit_into_the_actors_memory_is_rejected_alone(recipe, memory, last):
    """A PNG of 2000x2000 takes 36 MB to decode, and 70 MB to resize in float.

    Flipped in its size, it takes 12 MB until its shard is done.
    """
    shard, reader = shard_with(flat_png(2000), flat_png(3000), flat_png(100), flat_png(2000))
    block, _ = preprocess_shard(shard, replace(settings(recipe), memory=memory), reader=reader)
    reasons = block.column("reason").to_pylist()
    assert reasons == [None, "too large for --actor-memory", None, last[0]]
    assert block.column("detail")[3].as_py() == last[1]
    detail = block.column("detail")[1].as_py()
    assert (
        detail.startswith("3000x3000 pixels (png) take 0.")
        and f"there are {memory / 1e9:.2f} GB" in detail
    )


@pytest.mark.parametrize(
    ("recipe", "memory", "fit"),
    [
        (AS_IT_IS, 75_000_000, [[True] * 3 + [False] * 2, [True] * 2]),
        (Recipe(name="large", ops=(Resize(height=2000, width=2000),)), 100_000_000, None),
    ],
)
def test_images_that_fit_alone_are_given_back_until_they_are_delivered(recipe, memory, fit):
    """Encoded, these are 20 kB each: nothing but their headers tells that a shard is too large."""
    images = [flat_png(2000)] * 5
    shard, _ = shard_with(*images)
    asked = replace(settings(recipe), memory=memory)
    work, passes = shard, []

    class Given:
        def read(self, shard):
            return images[: shard.num_rows]

    left = [shard]
    while left:
        block, _ = preprocess_shard(left[0], asked, reader=Given())
        assert set(block.column("detail").to_pylist()) <= {None, NO_ROOM}
        good = [reason is None for reason in block.column("reason").to_pylist()]
        number = left[0].column("shard")[0].as_py()
        ids = block.column("image_id").to_pylist()
        waiting = {i for i, one in zip(ids, good, strict=True) if not one}
        passes.append(good)
        if waiting:
            new = requeued(work, {number: waiting}, rows_per_shard=256, tight={number})
            known = set(work.column("shard").to_pylist())
            fresh = [one for one in shards(new) if one.column("shard")[0].as_py() not in known]
            work, left = new, [*left, *fresh]
        left = left[1:]
    assert sum(map(sum, passes)) == 5
    assert fit is None or passes == fit
    block, _ = preprocess_shard(shard, replace(asked, gives_back=False), reader=Given())
    reasons = block.column("reason").to_pylist()
    assert reasons[-1] == "too large for --actor-memory"  # as in a training
    assert "; others of its shard take 0.0" in block.column("detail")[4].as_py()
