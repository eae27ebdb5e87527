import cv2
import numpy as np
import pytest
from faster_coco_eval.core import mask

from raypipe.data.shapes import Placement, moved_keypoints, moved_segmentation, placement
from raypipe.images import opencv
from raypipe.images.frames import into_picture
from raypipe.images.ops.geometry import Affine, Crop, Flip, Pad, Resize

SOURCE = (60, 80)
PLANS = {
    "resize": (Resize(height=120, width=100),),
    "flip": (Flip(),),
    "upside down": (Flip(axis="vertical"), Resize(height=90, width=90)),
    "crop": (Crop(top=10, left=15, height=40, width=50), Resize(height=100, width=100)),
    "pad": (Pad(left=7, top=3, right=2),),
    "turned": (Affine(matrix=(0.9, -0.3, 10, 0.3, 0.9, -5)),),
}
POLYGON = [20.0, 15.0, 60.0, 12.0, 55.0, 45.0, 22.0, 50.0]


def filled(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """What is inside, drawn eight times as large for its edges' sake."""
    image = np.zeros((8 * size[0], 8 * size[1]), np.uint8)
    for polygon in polygons:
        cv2.fillPoly(image, [np.rint(8 * np.array(polygon).reshape(-1, 2)).astype(np.int32)], 255)
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def executed(image: np.ndarray, plan: tuple, size: tuple[int, int]) -> np.ndarray:
    out = np.empty((*size, 3), np.uint8)
    opencv.execute(cv2.cvtColor(image, cv2.COLOR_GRAY2RGB), plan, out)
    return out[..., 0]


@pytest.mark.parametrize("name", PLANS)
def test_polygons_go_where_the_pixels_go(name):
    plan = PLANS[name]
    place = placement(plan, SOURCE)
    moved = moved_segmentation([POLYGON, [0, 0, 5, 0, 5, 5, 0, 5]], place)
    shown, expected = (
        filled(moved, place.size),
        executed(filled([POLYGON, [0, 0, 5, 0, 5, 5, 0, 5]], SOURCE), plan, place.size),
    )
    assert np.abs(shown.astype(int) - expected).mean() < 6
    points = np.concatenate([np.array(polygon).reshape(-1, 2) for polygon in moved])
    assert (points >= 0).all() and (points <= place.size[::-1]).all()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", ["text", "lengths"])
def test_run_lengths_do_too_and_stay_of_their_kind(name, kind):
    plan = PLANS[name]
    place = placement(plan, SOURCE)
    pixels = (filled([POLYGON], SOURCE) > 127).astype(np.uint8)
    value = mask.encode(np.asfortranarray(pixels))
    value["counts"] = value["counts"].decode()
    if kind == "lengths":
        flat = pixels.reshape(-1, order="F")
        value["counts"] = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]).tolist()
    moved = moved_segmentation(value, place)
    assert isinstance(moved["counts"], str if kind == "text" else list) and moved["size"] == list(
        place.size
    )
    found = mask.decode(moved if kind == "text" else mask.frPyObjects(moved, *place.size))
    expected = executed(pixels * 255, plan, place.size) > 127
    assert (found != expected).mean() < 0.02 and found.any()


def test_mlperfs_upscaling_multiplies_polygons():
    place = placement((Resize(height=1200, width=1200),), (480, 640))
    assert moved_segmentation([[10, 20, 30.5, 20, 30, 48]], place) == [
        [18.75, 50, 57.1875, 50, 56.25, 120]
    ]


def test_what_is_cut_off_is_left_out():
    place = placement((Crop(top=0, left=0, height=20, width=20),), SOURCE)
    assert moved_segmentation([[30, 30, 50, 30, 50, 50]], place) is None
    assert moved_segmentation([[10, 10, 30, 10, 30, 30, 10, 30]], place) == [
        [10, 20, 10, 10, 20, 10, 20, 20]
    ]


def test_keypoints():
    names = ["nose", "left_eye", "right_eye", "tail"]
    points = [40, 30, 2, 30, 20, 2, 50, 20, 1, 0, 0, 0]
    resized = placement((Resize(height=120, width=160),), SOURCE)
    assert moved_keypoints(points, resized, names) == [80, 60, 2, 60, 40, 2, 100, 40, 1, 0, 0, 0]
    mirrored = placement((Flip(),), SOURCE)
    assert moved_keypoints(points, mirrored, names) == [40, 30, 2, 30, 20, 1, 50, 20, 2, 0, 0, 0]
    cropped = placement((Crop(top=0, left=0, height=60, width=45),), SOURCE)
    assert moved_keypoints(points, cropped, names) == [40, 30, 2, 30, 20, 2, 0, 0, 0, 0, 0, 0]


def test_shapes_on_an_image_that_was_resized_after_annotation_are_scaled():
    place = Placement(source=(200, 400), size=(200, 400), matrix=(1, 0, 0, 0, 1, 0)).of_frame(
        (100, 200)
    )
    assert moved_segmentation([[10, 20, 30, 20, 30, 40]], place) == [[20, 40, 60, 40, 60, 80]]
    assert (
        Placement(source=(200, 400), size=(200, 400), matrix=(1, 0, 0, 0, 1, 0)).of_frame(
            (400, 200)
        )
        is None
    )


@pytest.mark.parametrize(
    "nonsense",
    [
        [[1, 2, 3]],
        [["a", "b"]],
        {"size": [1, 2]},
        {"size": [60, 80], "counts": "\0"},
        {"size": [60, 80], "counts": [1]},
        5,
        [[1e999] * 6],
    ],
)
def test_nonsense_is_left_out(nonsense):
    assert moved_segmentation(nonsense, placement((), SOURCE)) is None
    assert moved_keypoints([1, 2], placement((), SOURCE)) is None
    assert moved_keypoints(["a", 2, 3], placement((), SOURCE)) is None


@pytest.mark.parametrize("orientation", [1, 6, 8, 5, 7])
@pytest.mark.parametrize("scale", [1, 2])
def test_shapes_drawn_in_the_frame_of_boxes_move_as_these_do(orientation, scale):
    stored, box = (100, 200), np.array([[30, 20, 110, 60]], np.float32)
    upright = stored if orientation < 5 else stored[::-1]
    frame = stored[0] * scale, stored[1] * scale
    x1, y1, x2, y2 = (scale * box[0]).tolist()
    went = Placement(
        source=upright, size=upright, matrix=(1, 0, 0, 0, 1, 0), orientation=orientation
    ).of_frame(frame)
    (polygon,) = moved_segmentation([[x1, y1, x2, y1, x2, y2, x1, y2]], went)
    corners = np.array(polygon).reshape(-1, 2)
    expected, _ = into_picture(box * scale, frame, upright, orientation)
    np.testing.assert_allclose([*corners.min(axis=0), *corners.max(axis=0)], expected[0], atol=1e-3)
    assert (
        Placement(source=upright, size=upright, matrix=(1, 0, 0, 0, 1, 0)).of_frame((7, 90)) is None
    )
