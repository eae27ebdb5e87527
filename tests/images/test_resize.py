"""Resizing: antialiased, in float, by area."""

import cv2
import numpy as np
import pytest
import torch

from raypipe.images import opencv, resize, torchvision
from raypipe.images.ops.geometry import Resize
from tests.images.pixels import difference, pillow_resized


def test_antialiased_resize_is_pillows_at_any_size():
    rng = np.random.default_rng(3)
    for _ in range(150):
        height, width, new_height, new_width = rng.integers(1, 260, 4).tolist()
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        result = opencv.apply(Resize(height=new_height, width=new_width, antialias=True), image)
        assert (
            difference(np.ascontiguousarray(result), pillow_resized(image, new_height, new_width))
            <= 1
        )


def test_white_stays_white_and_black_black():
    for value in (0, 255):
        image = np.full((1237, 777, 3), value, np.uint8)
        assert (opencv.apply(Resize(height=301, width=97, antialias=True), image) == value).all()


def test_weighted_rows_are_exact(scene):
    """Whatever order a BLAS adds in, on however many threads: the same as in whole numbers."""
    starts, weights = resize.bands(scene.shape[0], 100)
    _, band, taps = weights.shape
    whole = np.round(weights.astype(np.float64) * 65536).astype(np.int64)
    np.testing.assert_array_equal(whole / 65536, weights)
    rows = []
    for row in range(100):
        start = starts[row // band]
        assert whole[row // band, row % band].sum() == 65536
        rows.append(
            np.einsum(
                "t,txc->xc",
                whole[row // band, row % band],
                scene[start : start + taps].astype(np.int64),
            )
        )
    expected = np.rint(np.stack(rows) / 65536).astype(np.uint8)
    np.testing.assert_array_equal(resize.weighted_rows(scene, 100), expected)


def test_the_last_resize_writes_straight_into_the_shard(scene):
    for antialias in (False, True):
        out = np.empty((100, 120, 3), np.uint8)
        assert opencv.apply(Resize(height=100, width=120, antialias=antialias), scene, out) is out


def test_float_resizing_is_off_in_few_values_with_torchvision_and_uint8_in_a_third(picture):
    """The figures that README and the descriptions state."""
    exact = cv2.resize(
        picture.astype(np.float32), (300, 300), interpolation=cv2.INTER_LINEAR
    ).astype(np.uint8)
    op = Resize(height=300, width=300, arithmetic="float", rounding="down")
    np.testing.assert_array_equal(opencv.apply(op, picture), exact)
    theirs = (
        torchvision.apply(op, torch.from_numpy(picture).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    )
    assert (theirs != exact).mean() < 0.05 and difference(theirs, exact) <= 1


@pytest.mark.parametrize("size", [(64, 48), (300, 123), (501, 640)])
def test_area_is_opencvs(size, picture):
    op = Resize(height=size[0], width=size[1], area=True)
    expected = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(opencv.apply(op, picture), expected)
    theirs = (
        torchvision.apply(op, torch.from_numpy(picture).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    )
    assert difference(theirs, expected) <= (1 if size[0] < picture.shape[0] else 3)


@pytest.mark.parametrize(
    "op",
    [Resize(height=300, width=300, arithmetic="float"), Resize(height=100, width=90, area=True)],
)
def test_results_do_not_depend_on_the_number_of_threads(op):
    images = [
        np.random.default_rng(i).integers(0, 256, (100 + i, 150 + i % 7, 3), np.uint8)
        for i in range(20)
    ]

    def made(threads: int) -> list[np.ndarray]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return [
                torchvision.apply(op, torch.from_numpy(image).permute(2, 0, 1)).numpy()
                for image in images
            ]
        finally:
            torch.set_num_threads(before)

    for one, four in zip(made(1), made(4), strict=True):
        np.testing.assert_array_equal(one, four)
