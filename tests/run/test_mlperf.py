"""MLPerf's loaders find what --mlperf-cache wrote under the paths they build."""

import json
import os

import cv2
import numpy as np
import pytest

from raypipe import UsageError
from raypipe.run.preprocess import run
from tests.conftest import files, jpeg
from tests.support.runs import quiet, settings


def coco(tmp_path, *, names=("000000001.jpg", "000000002.jpg", "000000003.jpg")):
    (tmp_path / "data/val2017").mkdir(parents=True)
    (tmp_path / "data/annotations").mkdir()
    images = []
    for number, name in enumerate(names):
        (tmp_path / "data/val2017" / name).write_bytes(jpeg(number))
        images.append({"id": number + 1, "file_name": name, "height": 120, "width": 160})
    shape = {
        "bbox": [16, 12, 32, 24],
        "area": 384,
        "iscrowd": 0,
        "segmentation": [[16, 12, 48, 12, 48, 36, 16, 36]],
        "keypoints": [16, 12, 2, 0, 0, 0],
        "num_keypoints": 1,
    }
    annotations = [
        {"id": n + 1, "image_id": n + 1, "category_id": 1, **shape} for n in range(len(names))
    ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    path = tmp_path / "data/annotations/instances_val2017.json"
    path.write_text(json.dumps(content))
    return tmp_path / "data", path


def where_mlperf_looks(cache_dir, name: str, image_format: str, image_name: str) -> str:
    """As coco.py, openimages.py and imagenet.py of MLPerf's inference build it."""
    return os.path.join(cache_dir, "preprocessed", name, image_format, image_name) + ".npy"


@pytest.mark.parametrize(
    ("recipe", "layout", "form", "dtype", "shape"),
    [
        ("coco-300", "nchw", "NCHW", np.uint8, (3, 300, 300)),
        ("coco-300-pt", "nhwc", "NHWC", np.float32, (300, 300, 3)),
    ],
)
def test_coco(session, tmp_path, recipe, layout, form, dtype, shape):
    data, annotations = coco(tmp_path)
    wanted = settings(
        input=data / "val2017",
        annotations=annotations,
        output=tmp_path / "out",
        recipe=recipe,
        format="npy",
        layout=layout,
        mlperf_cache=recipe,
    )
    run(wanted, console=quiet())
    for image in json.loads(annotations.read_text())["images"]:
        image_name = os.path.join("val2017", image["file_name"])
        array = np.load(where_mlperf_looks(tmp_path / "out", recipe, form, image_name))
        assert (array.dtype, array.shape) == (dtype, shape)
        source = cv2.imread(str(data / image_name)).astype(np.float32)
        resized = cv2.resize(
            cv2.cvtColor(source, cv2.COLOR_BGR2RGB), (300, 300), interpolation=cv2.INTER_LINEAR
        )
        expected = resized.astype(np.uint8) if recipe == "coco-300" else (resized - 127.5) / 127.5
        array = array if form == "NHWC" else array.transpose(1, 2, 0)
        assert np.abs(array - expected.astype(np.float32)).max() <= (
            0 if recipe == "coco-300" else 0.5001 / 127.5
        )
    assert len(files(tmp_path / "out")) == 3
    assert run(wanted, console=quiet()).report is None  # nothing left to do


def test_imagenet(session, tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"ILSVRC2012_val_0000000{number}.JPEG").write_bytes(
            jpeg(number, height=300, width=400)
        )
    wanted = settings(
        input=tmp_path / "data",
        output=tmp_path / "out",
        recipe="imagenet",
        format="npy",
        mlperf_cache="imagenet",
    )
    run(wanted, console=quiet())
    for number in range(3):
        path = where_mlperf_looks(
            tmp_path / "out", "imagenet", "NHWC", f"ILSVRC2012_val_0000000{number}.JPEG"
        )
        assert np.load(path).shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "jpeg"}, r"--mlperf-cache coco-300 is for --format npy; this run writes jpeg"),
        ({"mlperf_cache": "../coco"}, r"--mlperf-cache is '../coco'; it is the name"),
        (
            {"format": "png", "mlperf_cache": None, "layout": "nchw"},
            r"--layout nchw is for --format npy",
        ),
    ],
)
def test_what_makes_no_cache_is_refused(tmp_path, changed, message):
    data, _ = coco(tmp_path)
    given = {
        "input": data / "val2017",
        "output": tmp_path / "out",
        "format": "npy",
        "mlperf_cache": "coco-300",
    }
    with pytest.raises(UsageError, match=message):
        run(settings(**(given | changed)), console=quiet())


def test_names_that_mlperf_would_not_find_are_refused(tmp_path):
    data, _ = coco(tmp_path, names=("a.jpg", "a.png.jpg", "A.jpg"))
    with pytest.raises(
        UsageError, match=r"--mlperf-cache names a file by its image file, and .* would become "
    ):
        run(
            settings(
                input=data / "val2017",
                output=tmp_path / "out",
                format="npy",
                mlperf_cache="coco-300",
            ),
            console=quiet(),
        )


@pytest.mark.parametrize("recipe", ["coco-300", "ssd-300-train"])
def test_shapes_of_annotations_are_moved_with_the_image(session, tmp_path, recipe):
    data, annotations = coco(tmp_path)
    wanted = settings(
        input=data / "val2017",
        annotations=annotations,
        output=tmp_path / "out",
        recipe=recipe,
        format="png",
        seed=3,
    )
    report = run(wanted, console=quiet()).report
    written = json.loads((tmp_path / "out/annotations/instances_val2017.json").read_text())[
        "annotations"
    ]
    assert len(written) == 3 and report["shapes_dropped"] == 0
    for annotation in written:
        points = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        left, top, width, height = annotation["bbox"]
        np.testing.assert_allclose(
            [*points.min(0), *points.max(0)], [left, top, left + width, top + height], atol=0.01
        )
    if recipe == "coco-300":
        assert written[0]["segmentation"] == [[30, 30, 90, 30, 90, 90, 30, 90]]
        assert written[0]["keypoints"] == [30, 30, 2, 0, 0, 0] and written[0]["num_keypoints"] == 1
