"""Box geometry, and boxes beside the pixels that they are around."""

import numpy as np
import pytest
import torch

from raypipe.images import opencv, torchvision
from raypipe.images.ops.augment import HorizontalFlip, VerticalFlip
from raypipe.images.ops.boxes import iou
from raypipe.images.ops.geometry import CenterCrop, PadTo, Resize, ShortSide
from raypipe.images.ops.random_geometry import (
    IoUCrop,
    LargeScaleJitter,
    MultiScale,
    RandomAffine,
    RandomCrop,
    ZoomOut,
)
from tests.images.planning import plan

GEOMETRY = [
    HorizontalFlip(p=1),
    VerticalFlip(p=1),
    ZoomOut(p=1, fill=(0, 0, 0)),
    IoUCrop(),
    IoUCrop(flavour="mlperf"),
    RandomCrop(height=300, width=280),
    CenterCrop(height=301, width=400),
    ShortSide(short=300, long=350),
    MultiScale(sizes=(200, 333), long=900),
    LargeScaleJitter(height=300, width=300, scale=(0.7, 1.5), fill=(0, 0, 0)),
    PadTo(height=500, width=700),
    RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.8, 1.1), shear=5),
    Resize(height=123, width=456),
]


@pytest.mark.parametrize("backend", [opencv, torchvision])
@pytest.mark.parametrize("op", GEOMETRY, ids=lambda op: type(op).__name__)
def test_boxes_stay_on_what_they_show(op, backend):
    """Paints a rectangle, and looks for it where its box has gone."""
    image = np.zeros((400, 500, 3), np.uint8)
    image[150:260, 180:330] = 255
    box = np.array([[180, 150, 330, 260]], np.float32)
    for epoch in range(6):
        got = plan(op, epoch=epoch, size=(400, 500), boxes=box)
        out = np.empty((*got.size, 3), np.uint8)
        source = image if backend is opencv else torch.from_numpy(image).permute(2, 0, 1)
        backend.execute(source, got.ops, out)
        white = np.argwhere(out[..., 0] > 127)
        if not len(got.boxes):
            continue  # cut off: by the rule of its crop the box went with its centre
        found = [white[:, 1].min(), white[:, 0].min(), white[:, 1].max() + 1, white[:, 0].max() + 1]
        np.testing.assert_allclose(got.boxes[0], found, atol=1.6)


def test_iou_by_hand():
    boxes = np.array([[0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 30, 30], [3, 3, 3, 3]], np.float32)
    np.testing.assert_allclose(iou(boxes, (0, 0, 10, 10)), [1, 25 / 175, 0, 0])
