"""Draw boxes on an image, for people to look at."""

from collections.abc import Sequence

import cv2
import numpy as np

_COLOURS = (
    (230, 60, 60),
    (60, 180, 75),
    (40, 110, 230),
    (245, 160, 20),
    (150, 60, 200),
    (20, 170, 180),
    (220, 60, 180),
    (130, 110, 20),
)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, texts: Sequence[str]
) -> np.ndarray:
    """Draw boxes on a copy of `image`. A label always has the same colour.

    Line width and text size are in proportion to the image.

    Args:
        image: (height, width, 3) RGB uint8.
        boxes: (n, 4), x1 y1 x2 y2 in pixels; later ones are on top.
        labels: (n,) int.
        texts: n, for the upper left corners. OpenCV's fonts are ASCII: other letters become "?".
    """
    drawn = image.copy()
    side = max(image.shape[:2])
    line, scale = max(1, round(side / 400)), max(0.35, side / 1300)
    for (x1, y1, x2, y2), label, text in zip(
        np.round(boxes).astype(int).tolist(), labels.tolist(), texts, strict=True
    ):
        colour = _COLOURS[label % len(_COLOURS)]
        cv2.rectangle(drawn, (x1, y1), (x2, y2), colour, line)
        (width, height), below = cv2.getTextSize(
            text, cv2.FONT_HERSHEY_SIMPLEX, scale, max(1, line // 2)
        )
        # The text is above the box, or inside where there is no room above.
        bottom = y1 if y1 >= height + below + line else y1 + height + below + line
        cv2.rectangle(
            drawn, (x1, bottom - height - below - line), (x1 + width, bottom), colour, cv2.FILLED
        )
        at = (x1, bottom - below)
        cv2.putText(
            drawn,
            text,
            at,
            cv2.FONT_HERSHEY_SIMPLEX,
            scale,
            (255, 255, 255),
            max(1, line // 2),
            cv2.LINE_AA,
        )
    return drawn
