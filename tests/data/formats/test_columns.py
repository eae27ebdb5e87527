import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data.listing import list_images
from raypipe.images.header import Reject
from tests.data.conftest import read, reasons


def picture(value: int = 0) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 256, (5, 7, 3), np.uint8)


def nested(*arrays: np.ndarray, of: pa.DataType | None = None) -> pa.Array:
    return pa.array(
        [array.tolist() for array in arrays], pa.list_(pa.list_(pa.list_(of or pa.uint8())))
    )


def shown(data: bytes | Reject) -> np.ndarray:
    assert isinstance(data, bytes), data
    return np.load(io.BytesIO(data))


@pytest.mark.parametrize(
    "kind", ["ray", "ray v1", "arrow", "nested", "int64", "channels first", "flat", "fixed"]
)
def test_a_column_image_of_tensors(tmp_path, kind):
    images = [picture(i) for i in range(4)]
    columns: dict[str, object] = {"boxes_of": [[1, 2]] * 4}
    match kind:
        case "ray" | "ray v1":
            from ray.data._internal.tensor_extensions.arrow import ArrowTensorArray, ArrowTensorType

            columns["image"] = ArrowTensorArray.from_numpy(np.stack(images))
            if kind == "ray v1":
                flat = pa.array([i.reshape(-1) for i in images], pa.list_(pa.uint8()))
                columns["image"] = pa.ExtensionArray.from_storage(
                    ArrowTensorType((5, 7, 3), pa.uint8()), flat
                )
        case "arrow":
            columns["image"] = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(images))
        case "nested":
            columns["image"] = nested(*images)
        case "int64":
            columns["image"] = nested(*images, of=pa.int64())
        case "channels first":
            columns["image"] = nested(*(np.moveaxis(i, 2, 0) for i in images))
        case "flat":
            columns |= {
                "image": pa.array([i.reshape(-1) for i in images], pa.list_(pa.uint8())),
                "height": [5] * 4,
                "width": [7] * 4,
            }
        case "fixed":
            columns["image"] = nested(*images).cast(
                pa.list_(pa.list_(pa.list_(pa.uint8(), 3), 7), 5)
            )
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=3)
    results = read(list_images(str(tmp_path)))
    for result, image in zip(results, images, strict=True):
        np.testing.assert_array_equal(shown(result), image)


def test_tensors_of_different_shapes_as_ray_stores_them(tmp_path):
    from ray.data._internal.tensor_extensions.arrow import ArrowVariableShapedTensorArray

    images = [picture(0), picture(1)[:3], picture(2)[:, :4]]
    column = ArrowVariableShapedTensorArray.from_numpy(np.array([*images, None], object)[:3])
    pq.write_table(pa.table({"image": column, "id": [1, 2, 3]}), tmp_path / "a.parquet")
    for result, image in zip(read(list_images(str(tmp_path))), images, strict=True):
        np.testing.assert_array_equal(shown(result), image)


def test_tensors_that_are_grey_have_alpha_or_are_no_images(tmp_path):
    grey, alpha = picture()[:, :, :1], np.concatenate([picture(), picture(1)[:, :, :1]], axis=2)
    ragged = [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]]
    rows = [
        grey.tolist(),
        alpha.tolist(),
        picture()[:, :, :2].tolist(),
        ragged,
        None,
        [],
        [[[300, 0, 0]]],
        [[[-1, 0, 0]]],
        [[[None, 0, 0]]],
    ]
    pq.write_table(
        pa.table({"image": pa.array(rows, pa.list_(pa.list_(pa.list_(pa.int32()))))}),
        tmp_path / "a.parquet",
    )
    results = read(list_images(str(tmp_path)))
    np.testing.assert_array_equal(shown(results[0]), np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(shown(results[1]), alpha[:, :, :3])
    assert (
        reasons(results)[2:]
        == ["unsupported mode", "corrupt", "empty", "empty"] + ["unsupported mode"] * 3
    )
    pq.write_table(
        pa.table(
            {"image": pa.array([picture()[:, :, 0].tolist()], pa.list_(pa.list_(pa.uint8())))}
        ),
        tmp_path / "a.parquet",
    )
    np.testing.assert_array_equal(
        shown(read(list_images(str(tmp_path)))[0])[:, :, 1], picture()[:, :, 0]
    )
    pq.write_table(
        pa.table({"image": nested(picture()).cast(pa.list_(pa.list_(pa.list_(pa.float32()))))}),
        tmp_path / "a.parquet",
    )
    with pytest.raises(UsageError, match=r"no column with images.*float.*whole numbers"):
        list_images(str(tmp_path))
