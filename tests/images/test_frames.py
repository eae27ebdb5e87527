import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from raypipe.images.frames import (
    SCALED,
    STORED,
    STORED_SCALED,
    UNCLEAR,
    UPRIGHT,
    into_picture,
    sound,
)
from raypipe.images.header import Reject

BOX = (30, 20, 110, 60)


def painted(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    picture = np.full((height, width, 3), 70, np.uint8)
    x1, y1, x2, y2 = box
    picture[y1:y2, x1:x2] = (220, 20, 20)
    return picture


def red(picture: np.ndarray) -> list[int]:
    rows, columns = np.nonzero(picture[:, :, 0].astype(int) - picture[:, :, 1] > 100)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_boxes_drawn_on_the_stored_picture_are_where_the_thing_is_once_it_is_upright(
    orientation, scale
):
    stored = painted(100, 200, BOX)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(file, "PNG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    boxes, frame = np.array([BOX], np.float32) * scale, (int(100 * scale), int(200 * scale))
    moved, kind = into_picture(boxes, frame, upright.shape[:2], orientation)
    if orientation >= 5:
        assert kind == (STORED if scale == 1 else STORED_SCALED)
        np.testing.assert_allclose(moved, [red(upright)], atol=1e-3)
    elif orientation == 1:
        assert kind == (UPRIGHT if scale == 1 else SCALED)
        np.testing.assert_allclose(moved, [red(upright)], atol=1e-3)
    else:  # the sizes are the same either way
        assert kind == UNCLEAR
        np.testing.assert_allclose(moved, [BOX], atol=1e-3)


@pytest.mark.parametrize(
    ("frame", "size", "orientation", "kind", "expected"),
    [
        ((200, 100), (200, 100), 6, UPRIGHT, [10, 20, 30, 40]),
        ((100, 200), (200, 100), 1, None, None),
        ((100, 200), (201, 400), 1, SCALED, [20, 40.2, 60, 80.4]),
        ((427, 640), (426, 640), 1, SCALED, [10, 20 * 426 / 427, 30, 40 * 426 / 427]),
        ((1000, 1500), (333, 500), 1, SCALED, [10 / 3, 6.66, 10, 13.32]),
        ((100, 100), (100, 100), 6, UNCLEAR, [10, 20, 30, 40]),
        ((50, 50), (100, 100), 8, UNCLEAR, [20, 40, 60, 80]),
        ((100, 100), (100, 200), 1, None, None),
        ((480, 640), (500, 640), 1, None, None),
        ((0, 0), (500, 640), 6, "unknown", [10, 20, 30, 40]),
    ],
)
def test_frames_by_their_sizes(frame, size, orientation, kind, expected):
    boxes = np.array([[10, 20, 30, 40]], np.float32)
    if expected is None:
        with pytest.raises(
            Reject, match=f"bad boxes: .*{frame[0]}x{frame[1]} .*{size[0]}x{size[1]}"
        ):
            into_picture(boxes, frame, size, orientation)
        return
    moved, found = into_picture(boxes, frame, size, orientation)
    assert found == (None if kind == "unknown" else kind)
    np.testing.assert_allclose(moved, [expected], rtol=1e-5)


def test_an_image_without_boxes_is_never_rejected_for_its_frame():
    assert into_picture(np.empty((0, 4), np.float32), (3, 7), (500, 640), 1)[1] is None


def test_sound_boxes_keep_their_numbers_and_the_others_have_reasons():
    given = np.array(
        [
            [1, 1, 2, 2],
            [np.nan, 0, 1, 1],
            [-5, -5, 3, 3],
            [1e30, 0, 2e30, 5],
            [5, 5, 4, 9],
            [3, 3, 3, 9],
            [0, 0, np.inf, 5],
        ],
        np.float32,
    )
    boxes, keep, dropped = sound(given, (10, 10))
    assert boxes.tolist() == [[1, 1, 2, 2], [0, 0, 3, 3]] and keep.tolist() == [0, 2]
    assert dict(dropped) == {
        1: "not finite",
        3: "outside the image",
        4: "corners swapped",
        5: "no area",
        6: "not finite",
    }
    assert given[2, 0] == -5
