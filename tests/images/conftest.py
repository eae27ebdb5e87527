from pathlib import Path

import cv2
import numpy as np
import pytest

from raypipe.images import opencv, torchvision

# Debian's opencv-doc; used where it is installed.
_DEBIAN = Path("/usr/share/doc/opencv-doc/examples/data")
_REAL = [name for name in ("fruits.jpg", "messi5.jpg") if (_DEBIAN / name).is_file()]
_MADE = ["texture", "edges", "noise", "grey"]


def make_photo(kind: str) -> np.ndarray:
    """A photo-like image, or an extreme that is hard to process: RGB uint8, about 400x500."""
    rng = np.random.default_rng(len(kind))
    height, width = 381, 507
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "edges":
        image = np.full((height, width, 3), (200, 30, 90), np.uint8)
        for _ in range(60):
            x1, y1, x2, y2 = rng.integers(0, 500, 4).tolist()
            cv2.line(
                image, (x1, y1), (x2, y2), rng.integers(0, 256, 3).tolist(), int(rng.integers(1, 9))
            )
        return image
    octaves = [
        rng.normal(0, 90 / 2**k, (4 * 2**k, 5 * 2**k, 3)).astype(np.float32) for k in range(6)
    ]
    texture = sum(
        cv2.resize(octave, (width, height), interpolation=cv2.INTER_CUBIC) for octave in octaves
    )
    sky = np.linspace(170, 70, height, dtype=np.float32)[:, None, None]
    image = np.clip(sky + texture * 0.5, 0, 255)
    if kind == "grey":
        image = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return image.astype(np.uint8)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread, as in an actor. With more, small images are slower."""
    opencv.setup(1)
    torchvision.setup(1)


@pytest.fixture(scope="session", params=[*_MADE, *_REAL])
def picture(request) -> np.ndarray:
    """Each image in turn, HWC RGB uint8: generated ones, and real photos if installed."""
    if request.param in _MADE:
        return make_photo(request.param)
    return cv2.cvtColor(cv2.imread(str(_DEBIAN / request.param)), cv2.COLOR_BGR2RGB)


@pytest.fixture(scope="session")
def scene() -> np.ndarray:
    return make_photo("texture")
