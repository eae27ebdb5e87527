"""Labels by folders, and the annotations of YOLO, Pascal VOC and Hugging Face."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision

from raypipe import UsageError
from raypipe.data.formats.huggingface import classes_of, holds
from raypipe.data.formats.voc import parse as parse_voc
from raypipe.data.formats.yolo import parse as parse_yolo
from raypipe.data.listing import look
from raypipe.data.location import Location
from raypipe.data.sinks import Sink, write_shard
from raypipe.data.tables import unlist
from raypipe.images import opencv
from raypipe.images.frames import UNIT, into_picture
from tests.conftest import jpeg
from tests.data.conftest import IMAGES, block, ids, pictures, put


def labels(table: pa.Table) -> list[list[int]]:
    return [of.tolist() for of in unlist(table["labels"])]


# --- folders


def test_folder_labels_are_those_of_torchvisions_image_folder(tmp_path):
    put(tmp_path, "dog/1.jpg", "cat/x/2.jpg", "cat/1.jpg", "Zebra/1.png", "loose.jpg")
    found = look(str(tmp_path), labels="folder")
    reference = torchvision.datasets.ImageFolder(str(tmp_path))
    assert found.classes == tuple(reference.classes) == ("Zebra", "cat", "dog")
    theirs = {path.removeprefix(f"{tmp_path}/"): label for path, label in reference.samples}
    assert {
        image_id: of for image_id, (of,) in zip(ids(found.rows), labels(found.rows), strict=True)
    } == theirs
    assert found.skipped == {"(in no class folder)": 1}
    # The numbers do not depend on how many images are used.
    few = look(str(tmp_path), labels="folder", limit=2)
    assert few.classes == found.classes and labels(few.rows) == labels(found.rows)[:2]


def test_labels_that_cannot_be_given_are_refused(tmp_path):
    put(tmp_path, "1.jpg")
    (tmp_path / "tars").mkdir()
    with pytest.raises(UsageError, match=r"no image of .* is in a folder of its class"):
        look(str(tmp_path), labels="folder")
    with pytest.raises(UsageError, match="'demo:3' cannot have labels from 'folder'"):
        look("demo:3", labels="folder")


# --- YOLO


@pytest.fixture
def yolo(tmp_path):
    put(tmp_path, "images/train/a.jpg", "images/train/b.jpg", "images/train/sub/c.jpg")
    texts = tmp_path / "labels" / "train"
    (texts / "sub").mkdir(parents=True)
    (texts / "a.txt").write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.3 0.1 0.2 0.5\n")
    (texts / "sub" / "c.txt").write_text("0 0.25 0.75 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nnames: {0: cat, 1: dog}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("input", "annotations"),
    [
        ("images/train", "data.yaml"),
        (".", "data.yaml"),
        ("images/train", "labels/train"),
    ],
)
def test_yolos_files_are_found_beside_the_images(yolo, input, annotations):
    found = look(str(yolo / input), annotations=str(yolo / annotations))
    rows = found.rows
    assert [path.rpartition("train/")[2] for path in ids(rows)] == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert labels(rows) == [[1, 0], [], [0]]
    a, b, c = unlist(rows["boxes"])
    np.testing.assert_allclose(a, [[0.4, 0.3, 0.6, 0.7], [0.1, 0.1, 0.3, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(c, [[0, 0.5, 0.5, 1]])
    assert len(b) == 0 and rows["frame"].to_pylist() == [[1, 1], [0, 0], [1, 1]]
    assert found.classes == (("cat", "dog") if annotations.endswith("yaml") else ())


def test_shares_become_pixels_of_the_upright_image():
    boxes, kind = into_picture(np.float32([[0.1, 0.5, 0.5, 1]]), UNIT, (200, 100), 6)
    assert (boxes.tolist(), kind) == ([[10, 100, 50, 200]], "upright")


def test_yolos_nonsense_costs_its_image_the_boxes_and_unknown_classes_are_refused(yolo, caplog):
    (yolo / "labels/train/b.txt").write_text("0 12 14 300 20\n")
    with caplog.at_level(logging.WARNING):
        rows = look(str(yolo / "images/train"), annotations=str(yolo / "data.yaml")).rows
    assert labels(rows) == [[1, 0], [], [0]]
    assert "1 files of YOLO make no sense" in caplog.text and "no shares" in caplog.text
    (yolo / "data.yaml").write_text("names: [cat]")
    with pytest.raises(UsageError, match=r"a.jpg has class 1, but .*data.yaml' names 1"):
        look(str(yolo / "images/train"), annotations=str(yolo / "data.yaml"))
    (yolo / "data.yaml").write_text("names: {1: cat}")
    with pytest.raises(UsageError, match=r"cannot read YOLO's .*data.yaml', names: .*from 0 on"):
        look(str(yolo / "images/train"), annotations=str(yolo / "data.yaml"))


@pytest.mark.parametrize(
    "line", ["0", "x 0 0 1 1", "-1 0 0 1 1", "0 0 0 nan 1", "0 0 0 1 1 1 1 1", "1.5 0 0 1 1"]
)
def test_lines_that_are_not_yolos(line):
    with pytest.raises((ValueError, TypeError)):
        parse_yolo(line.encode())


# --- Pascal VOC

_VOC = """<annotation><filename>a.jpg</filename>
<size><width>{width}</width><height>100</height><depth>3</depth></size>
<object><name>person</name><difficult>1</difficult><bndbox>
<xmin>1</xmin><ymin>11</ymin><xmax>200</xmax><ymax>20.5</ymax></bndbox>
<part><name>head</name></part></object>
<object><name>dog</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>
</object></annotation>"""


def test_vocs_files_are_read_with_corners_from_0_on(tmp_path, caplog):
    put(tmp_path, "JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c.jpg")
    folder = tmp_path / "Annotations"
    folder.mkdir()
    (folder / "a.xml").write_text(_VOC.format(width=200))
    (folder / "b.xml").write_text("<annotation><object></annotation>")
    with caplog.at_level(logging.WARNING):
        found = look(str(tmp_path / "JPEGImages"), annotations=str(folder))
    assert found.classes == ("dog", "person")
    assert labels(found.rows) == [[1, 0], [], []]
    boxes = unlist(found.rows["boxes"])[0]
    np.testing.assert_allclose(boxes, [[0, 10, 200, 20.5], [4, 4, 9, 9]])
    assert found.rows["frame"].to_pylist() == [[100, 200], [0, 0], [0, 0]]
    assert "1 files of Pascal VOC make no sense" in caplog.text
    assert parse_voc(_VOC.format(width="").encode()).frame == (0, 0)


def test_folders_that_are_no_annotations_are_refused(tmp_path):
    put(tmp_path, "photos/a.jpg", "other/b.jpg", "texts/b.txt")
    with pytest.raises(UsageError, match="neither YOLO's text files nor Pascal VOC's"):
        look(str(tmp_path / "photos"), annotations=str(tmp_path / "other"))
    with pytest.raises(UsageError, match=r"none of the 1 images has a file of YOLO .*a\.txt"):
        look(str(tmp_path / "photos"), annotations=str(tmp_path / "texts"))
    with pytest.raises(UsageError, match="is no directory"):
        look(str(tmp_path / "photos/*.jpg"), annotations=str(tmp_path / "texts"))


# --- Hugging Face


def test_what_is_written_for_hugging_face_is_what_its_library_shows(tmp_path):
    datasets = pytest.importorskip("datasets")
    boxed = block(IMAGES)
    sink = Sink(format="huggingface", root=Location.of(str(tmp_path / "boxes")), holds="objects")
    write_shard(sink, boxed, encode=opencv.encode)
    plain = boxed.set_column(
        boxed.column_names.index("labels"),
        boxed.field("labels"),
        pa.array([[0], [1], [1]] * 2 + [[0]]),
    ).set_column(
        boxed.column_names.index("boxes"),
        boxed.field("boxes"),
        pa.array([[]] * 7, boxed["boxes"].type),
    )
    for shard in (1, 2):
        at = boxed.column_names.index("shard")
        plain = plain.set_column(at, boxed.field("shard"), pa.array([shard] * 7, pa.int64()))
        sink = Sink(
            format="huggingface",
            root=Location.of(str(tmp_path / "labels")),
            holds="label",
            classes=("cat", "dog"),
        )
        write_shard(sink, plain, encode=opencv.encode)
    (tmp_path / "labels" / "_raypipe").mkdir(exist_ok=True)
    pq.write_table(pa.table({"reason": ["corrupt"]}), tmp_path / "labels/_raypipe/rejects.parquet")

    def loaded(name: str):
        return datasets.load_dataset(
            str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache")
        )

    labelled, objects = loaded("labels"), loaded("boxes")
    assert labelled.num_rows == 14
    assert labelled.features["label"].names == ["cat", "dog"]
    first = labelled[0]
    assert first["image"].size == (IMAGES[0].shape[1], IMAGES[0].shape[0])
    assert (first["image_id"], first["label"]) == ("id-0", 0)
    third = objects[2]["objects"]
    assert (third["bbox"], third["category"]) == ([[1.5, 2, 1.5, 4], [1.5, 2, 1.5, 4]], [5, 6])


def test_what_is_written_for_hugging_face_is_an_input_again(tmp_path):
    root = Location.of(str(tmp_path))
    made = block(IMAGES)
    sink = Sink(format="huggingface", root=root, holds="objects", classes=tuple("abcdefg"))
    assert write_shard(sink, made, encode=opencv.encode).files == ["train-000012.parquet"]
    found = look(str(tmp_path))
    assert ids(found.rows) == made["image_id"].to_pylist() and found.classes == tuple("abcdefg")
    for name in ("boxes", "labels", "crowds", "annotation_ids"):
        assert found.rows[name].to_pylist() == made[name].to_pylist(), name
    for image, again in zip(IMAGES, pictures(found.rows), strict=True):
        assert again.shape == image.shape and np.abs(again.astype(int) - image).mean() < 4
    assert holds(found.rows) == "objects"


def test_other_layouts_of_objects_are_read(tmp_path):
    """As lists of structs, with a null and a box that is none."""
    objects = [
        [{"bbox": [1, 2, 3, 4], "category": 5}, {"bbox": None, "category": 6}],
        [],
        [{"bbox": [0, 0, 9, 9], "category": 7}, {"bbox": [1, 2], "category": 8}],
    ]
    of = pa.list_(pa.struct([("bbox", pa.list_(pa.float64())), ("category", pa.int64())]))
    table = pa.table({"image": [jpeg(0)] * 3, "objects": pa.array(objects, of)})
    features = {"objects": {"feature": {"category": {"names": ["x"], "_type": "ClassLabel"}}}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    found = look(str(tmp_path))
    boxes = [of.tolist() for of in unlist(found.rows["boxes"])]
    assert boxes[0][0] == [1, 2, 4, 6] and boxes[2][0] == [0, 0, 9, 9]
    assert np.isnan(boxes[0][1]).all() and np.isnan(boxes[2][1]).all()
    assert labels(found.rows) == [[5, 6], [], [7, 8]]
    assert found.classes == ("x",)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": 1}}}']
)
def test_foreign_features_name_no_classes(text):
    assert classes_of({b"huggingface": text}) == () == classes_of({})
