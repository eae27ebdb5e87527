import contextlib
import json
import logging
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from raypipe import UsageError
from raypipe.data.formats.coco import write_annotations
from raypipe.data.listing import list_images, look
from raypipe.data.location import Location
from raypipe.data.reader import Reader
from raypipe.data.tables import SOURCE
from raypipe.images.header import Reject
from tests.data.conftest import files, ids, names, put, read


def coco(tmp_path, **changes) -> str:
    content = {
        "images": [
            {"id": 7, "file_name": "two.jpg", "height": 10, "width": 20},
            {"id": 3, "file_name": "sub/one.jpg", "height": 10, "width": 20},
            {"id": 9, "file_name": "missing.jpg", "height": 10, "width": 20},
        ],
        "annotations": [
            {
                "id": 100,
                "image_id": 3,
                "category_id": 18,
                "bbox": [1, 2, 3.5, 4],
                "iscrowd": 0,
                "area": 14,
            },
            {
                "id": 101,
                "image_id": 7,
                "category_id": 1,
                "bbox": [0, 0, 5, 5],
                "iscrowd": 1,
                "area": 25,
            },
            {"id": 102, "image_id": 3, "category_id": 90, "bbox": [5, 5, 1, 1], "area": 1},
            {"id": 90, "image_id": 3, "category_id": 2, "bbox": [0, 1, 2, 3], "area": 6},
        ],
        "categories": [{"id": 1, "name": "person"}],
    } | changes
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_coco_lists_the_json_in_its_order(tmp_path):
    contents = put(tmp_path / "images", "two.jpg", "sub/one.jpg", "unlisted.jpg")
    table = list_images(str(tmp_path / "images"), annotations=coco(tmp_path))
    assert table.schema == SOURCE
    assert ids(table) == ["7", "3", "9"]
    assert names(table) == ["two", "sub/one", "missing"]
    assert table["boxes"].to_pylist() == [
        [[0, 0, 5, 5]],
        [[1, 2, 4.5, 6], [5, 5, 6, 6], [0, 1, 2, 4]],
        [],
    ]
    assert table["labels"].to_pylist() == [[1], [18, 90, 2], []]
    assert table["crowds"].to_pylist() == [[True], [False] * 3, []]
    assert table["annotation_ids"].to_pylist() == [[101], [100, 102, 90], []]
    results = read(table)
    assert results[:2] == [contents["two.jpg"], contents["sub/one.jpg"]]
    assert (
        isinstance(results[2], Reject)
        and results[2].reason == "unreadable"
        and "missing.jpg" in results[2].detail
    )
    assert list_images(str(tmp_path / "images"), annotations=coco(tmp_path), limit=2).equals(
        table.slice(0, 2)
    )


def test_coco_annotations_of_unknown_images_are_counted_and_ignored(tmp_path, caplog):
    put(tmp_path, "two.jpg")
    strangers = [
        {"id": i, "image_id": 555, "category_id": 1, "bbox": [0, 0, 1, 1]} for i in range(4)
    ]
    with caplog.at_level(logging.WARNING):
        table = list_images(str(tmp_path), annotations=coco(tmp_path, annotations=strangers))
    assert table["labels"].to_pylist() == [[], [], []]
    assert "4 annotations" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, 'no list "images"'),
        ({"images": []}, "list no image"),
        ({"images": [{"id": 1}]}, "number 0 has no id or no file_name"),
        ({"images": [{"file_name": "a.jpg"}]}, "number 0"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}] * 2}, "1 occurs twice"),
        ({"images": [{"id": [], "file_name": "a.jpg"}]}, "id"),
        ({"images": [{"id": 1, "file_name": "\ud800.jpg"}]}, "number 0"),
        ({"annotations": {}}, '"annotations" is no list'),
        (
            {"annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3]}]},
            "annotation number 0",
        ),
        (
            {"annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": "1234x"}]},
            "annotation number 0",
        ),
        ({"annotations": [{"id": 1, "image_id": 7, "bbox": [1, 2, 3, 4]}]}, "category_id"),
        ({"annotations": [{"id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}]}, "image_id"),
        ({"annotations": ["x"]}, "annotation number 0"),
    ],
)
def test_coco_that_makes_no_sense(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        list_images(str(tmp_path), annotations=coco(tmp_path, **changes))


def test_annotations_that_are_no_coco_at_all(tmp_path):
    put(tmp_path, "a.jpg")
    (tmp_path / "x.json").write_text('{"images": [')
    (tmp_path / "y.json").write_text("[1, 2]")
    (tmp_path / "z.json").write_bytes(b"\xff\xfe\x00")
    for file, message in (
        ("x.json", "not JSON"),
        ("y.json", "not COCO"),
        ("z.json", "not JSON"),
        ("nowhere.json", "cannot read"),
    ):
        with pytest.raises(UsageError, match=message):
            list_images(str(tmp_path), annotations=str(tmp_path / file))
    with pytest.raises(UsageError, match="is no directory"):
        list_images(str(tmp_path / "a.jpg"), annotations=coco(tmp_path))
    with pytest.raises(UsageError, match="its own boxes"):
        list_images("demo", annotations=coco(tmp_path))


def test_coco_boxes_may_be_nonsense_here(tmp_path):
    """The recipe judges them: the image becomes a reject, and the run goes on."""
    boxes = [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [float("nan"), 2, -3, 4]}]
    table = list_images(str(tmp_path), annotations=coco(tmp_path, annotations=boxes))
    left, top, right, bottom = table["boxes"][0].as_py()[0]
    assert np.isnan([left, right]).all() and (top, bottom) == (2, 6)


# --- numbers ---------------------------------------------------------------------------------


def one(tmp_path, image: dict | None = None, **annotation: object) -> pa.Table:
    images = [{"id": 1, "file_name": "a.jpg", "height": 100, "width": 200, **(image or {})}]
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], **annotation}]
    return list_images(
        str(tmp_path), annotations=coco(tmp_path, images=images, annotations=annotations)
    )


@pytest.mark.parametrize(
    ("image", "annotation", "expected"),
    [
        ({}, {"image_id": 1.0}, {}),
        ({"id": 1.0}, {"image_id": "1"}, {}),
        ({"id": "1"}, {"image_id": 1}, {}),
        ({"id": 2**64 - 1}, {"image_id": 2.0**64 - 1}, None),
        ({"id": 2**64 - 1}, {"image_id": 2**64 - 1}, {"image_id": str(2**64 - 1)}),
        ({"id": 10**30}, {"image_id": 10**30}, {"image_id": str(10**30)}),
        ({}, {"category_id": 3.0}, {"labels": [3]}),
        ({}, {"category_id": "3"}, {"labels": [3]}),
        ({}, {"iscrowd": "0"}, {}),
        ({}, {"iscrowd": 0.0}, {}),
        ({}, {"iscrowd": None}, {}),
        ({}, {"iscrowd": False}, {}),
        ({}, {"iscrowd": "1"}, {"crowds": [True]}),
        ({}, {"iscrowd": True}, {"crowds": [True]}),
        ({}, {"id": 2**64 - 1}, {"annotation_ids": [-1]}),
        ({}, {"id": "8c5d-uuid"}, {"annotation_ids": [-1]}),
        ({}, {"id": 5.0}, {"annotation_ids": [5]}),
        ({}, {"bbox": ["1", "2.0", 30.0, 40]}, {}),
        ({"height": "100", "width": 200.0}, {}, {}),
        ({"height": 10**30, "width": None}, {}, {"frame": [0, 0]}),
    ],
)
def test_numbers_mean_the_same_however_they_are_written(tmp_path, image, annotation, expected):
    row = one(tmp_path, image, **annotation).to_pylist()[0]
    if expected is None:
        assert row["boxes"] == []
        return
    wanted = {
        "image_id": "1",
        "boxes": [[1, 2, 31, 42]],
        "labels": [1],
        "crowds": [False],
        "annotation_ids": [1],
        "frame": [100, 200],
    }
    wanted |= expected
    assert {name: row[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    "annotation",
    [
        {"image_id": 1.5},
        {"image_id": None},
        {"image_id": float("inf")},
        {"category_id": 1.5},
        {"category_id": 2**63},
        {"category_id": 10**30},
        {"category_id": "cat"},
        {"category_id": True},
        {"iscrowd": "no"},
        {"iscrowd": 10**30},
        {"bbox": [1, 2, 3, {}]},
        {"bbox": {"x": 1}},
    ],
)
def test_numbers_that_are_none_are_refused_in_a_line_with_the_annotation(tmp_path, annotation):
    with pytest.raises(
        UsageError,
        match=r"annotation number 0 .*It needs image_id, category_id and a bbox of four numbers\.$",
    ):
        one(tmp_path, **annotation)


@pytest.mark.parametrize(
    "bbox",
    [
        [1, 2, 1e999, 4],
        [1e300, 2, 3, 4],
        [10**400, 2, 3, 4],
        [None, 2, 3, 4],
        [float("nan"), 2, 3, 4],
    ],
)
def test_a_coordinate_that_is_no_finite_number_spoils_its_box_only(tmp_path, bbox):
    (box,) = one(tmp_path, bbox=bbox)["boxes"].to_pylist()[0]
    assert not np.isfinite(box).all()


def test_nesting_too_deep_is_an_error_in_a_line(tmp_path):
    for text in (
        "[" * 100_000,
        '{"images": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"images": [{"id": ' + "[" * 800 + "]" * 800 + "}]}",
    ):
        (tmp_path / "deep.json").write_text(text)
        with pytest.raises(UsageError) as caught:
            list_images(str(tmp_path), annotations=str(tmp_path / "deep.json"))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 800


def test_files_that_the_json_does_not_name_are_counted(tmp_path, caplog):
    put(tmp_path / "images", "two.jpg", "sub/one.jpg", "unlisted.jpg", "sub/notes.txt", "more.jpg")
    given = coco(tmp_path)
    shutil.copy(given, tmp_path / "images/annotations.json")
    for limit in (None, 1):  # named is named, whether it is taken or not
        found = look(
            str(tmp_path / "images"),
            annotations=str(tmp_path / "images/annotations.json"),
            limit=limit,
        )
        assert found.skipped == {".jpg": 2, ".txt": 1}
    assert "3 files are left out: 2 .jpg, 1 .txt (not named in " in caplog.text
    assert not look(str(tmp_path / "images/sub"), annotations=given).skipped - Counter(
        {".jpg": 1, ".txt": 1}
    )


# --- writing ---------------------------------------------------------------------------------


def annotation(
    id: int, image_id: int, bbox: list[int], *, area: int, iscrowd: int = 0
) -> dict[str, object]:
    return {
        "id": id,
        "image_id": image_id,
        "category_id": 18,
        "bbox": bbox,
        "area": area,
        "iscrowd": iscrowd,
    }


def test_annotations_of_written_images(tmp_path):
    source = {
        "info": {"year": 2017},
        "licenses": [{"id": 1}],
        "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}],
        "my_own_key": [1, 2],
        "images": [
            {"id": 5, "file_name": "a.png", "height": 100, "width": 200, "coco_url": "http://x"},
            {"id": 3, "file_name": "rejected.jpg", "height": 100, "width": 200},
            {"id": 9, "file_name": "sub/empty.jpg", "height": 10, "width": 20},
        ],
        "annotations": [
            {
                **annotation(1, 5, [20, 10, 40, 20], area=400),
                "segmentation": [[1, 2, 3]],
                "keypoints": [1, 2, 2],
                "num_keypoints": 1,
                "score": 0.5,
            },
            annotation(2, 5, [0, 0, 1, 1], area=1),
            annotation(4, 3, [0, 0, 1, 1], area=1),
            annotation(7, 5, [0, 0, 200, 100], area=20000, iscrowd=1),
        ],
    }
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps(source))
    root = tmp_path / "out"
    # From 100x200 to 300x300: x is stretched 1.5 times, y 3 times. The recipe dropped annotation 2.
    rows = [
        ("9", "val/sub/empty.jpg", 30, 30, np.empty((0, 4), np.float32), []),
        (
            "5",
            "val/a.jpg",
            300,
            300,
            np.array([[0, 0, 300, 300], [30, 30, 90, 90]], np.float32),
            [7, 1],
        ),
    ]
    assert (
        write_annotations(Location.of(str(path)), Location.of(str(root)), rows, folder="val").file
        == "annotations/instances_val.json"
    )
    assert files(root).keys() == {"annotations/instances_val.json"}
    result = json.loads((root / "annotations/instances_val.json").read_text())
    assert result == source | {
        "images": [
            {"id": 5, "file_name": "a.jpg", "height": 300, "width": 300, "coco_url": "http://x"},
            {"id": 9, "file_name": "sub/empty.jpg", "height": 30, "width": 30},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 5,
                "category_id": 18,
                "bbox": [30, 30, 60, 60],
                "area": 1800,
                "iscrowd": 0,
                "score": 0.5,
            },
            {
                "id": 7,
                "image_id": 5,
                "category_id": 18,
                "bbox": [0, 0, 300, 300],
                "area": 90000,
                "iscrowd": 1,
            },
        ],
    }
    (root / "val").mkdir()
    again = list_images(str(root / "val"), annotations=str(root / "annotations/instances_val.json"))
    assert again["boxes"].to_pylist() == [[[30, 30, 90, 90], [0, 0, 300, 300]], []]


def test_annotations_whose_ids_are_unique_within_their_image_only_and_odd_values(tmp_path):
    source = {
        "images": [
            {"id": 1, "file_name": "a.jpg"},
            {"id": 2, "file_name": "b.jpg"},
            {"id": 3, "file_name": "left-out.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": None},
            {"id": 1, "image_id": 2, "category_id": 1, "bbox": ["5", "5", "10", "20"], "area": 200},
            {"id": "2", "image_id": 2, "category_id": 1, "bbox": [0, 0, 10, 10]},
            {"id": 1, "image_id": 3, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100},
            {"id": 1, "image_id": 1, "category_id": 1, "caption": "no box"},
        ],
    }
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(source))
    listed = list_images(str(tmp_path), annotations=str(path)).slice(0, 2).to_pylist()
    rows = [
        (
            row["image_id"],
            f"{row['name']}.jpg",
            20,
            20,
            [[2 * v for v in box] for box in row["boxes"]],
            row["annotation_ids"],
        )
        for row in listed
    ]
    write_annotations(Location.of(str(path)), Location.of(str(tmp_path / "out")), rows)
    result = json.loads((tmp_path / "out/annotations/boxes.json").read_text())["annotations"]
    assert [(one["image_id"], one["id"], one["bbox"], one.get("area")) for one in result] == [
        (1, 1, [0, 0, 20, 20], None),
        (2, 1, [10, 10, 20, 40], 800),
        (2, "2", [0, 0, 20, 20], None),
    ]


def test_annotations_from_something_else(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UsageError, match="not COCO"):
        write_annotations(
            Location.of(str(tmp_path / "x.json")), Location.of(str(tmp_path / "out")), []
        )
    assert not (tmp_path / "out").exists()


def test_s3_coco(bucket, tmp_path):
    Location.of(bucket("set")).write("images/one.jpg", b"one")
    content = {
        "images": [{"id": 1, "file_name": "one.jpg"}, {"id": 2, "file_name": "gone.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 2, 2]}],
    }
    Location.of(bucket("set")).write("annotations.json", json.dumps(content).encode())
    table = list_images(bucket("set/images"), annotations=bucket("set/annotations.json"))
    assert table["boxes"].to_pylist() == [[[1, 1, 3, 3]], []]
    with contextlib.closing(Reader()) as reader:
        first, second = reader.read(table)
    assert (
        first == b"one"
        and isinstance(second, Reject)
        and second.reason == "unreadable"
        and "gone.jpg" in second.detail
    )
    file = write_annotations(
        Location.of(bucket("set/annotations.json")),
        Location.of(bucket("out")),
        [("1", "one.jpg", 4, 4, [[0, 0, 1, 1]], [1])],
    ).file
    assert json.loads((Location.of(bucket("out")) / file).read())["annotations"][0]["bbox"] == [
        0,
        0,
        1,
        1,
    ]
