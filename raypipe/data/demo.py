"""The demo data: procedural photos of a landscape with labelled things. No download is needed.

A picture is a function of (seed, index). `layout` says what is where, cheaply; `render` paints it.
`read` gives its JPEG from a cache on this machine, and paints it first if it is missing. So any
node of a cluster can read `demo://SEED/INDEX`.

The cache is `raypipe/demo-vN` in $XDG_CACHE_HOME or ~/.cache. If that is not writable, it is in the
folder for temporary files.
"""

import contextlib
import functools
import getpass
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from raypipe import UsageError
from raypipe.data.location import Location

log = logging.getLogger(__name__)

COUNT = 500
"""The number of images of `--input demo`."""

CLASSES = ("ball", "box", "cone", "star", "ring", "cross")
"""Names of the classes. The label of CLASSES[i] is i + 1, as in COCO, where 0 means nothing."""

_VERSION = 1  # part of the cache's path: raise it when pixels or boxes change
_QUALITY = 88


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The things in a picture.

    size: (height, width). boxes: (n, 4) float32, xyxy, pixels. labels: (n,) int64, from 1.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    shapes: tuple["Shape", ...]
    horizon: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One thing: its class, outline ((m, 2) float32 pixels, x and y), centre, radius and paint."""

    label: int
    outline: np.ndarray
    centre: tuple[float, float]
    radius: float
    colour: tuple[float, float, float]
    stripes: float
    angle: float


def layout(seed: int, index: int) -> Layout:
    """The layout of picture `index` of the set `seed`: 1 to 6 things that overlap little."""
    rng = np.random.default_rng((seed, index, 0))
    height, width = int(rng.integers(480, 641)), int(rng.integers(520, 801))
    horizon = int(height * rng.uniform(0.3, 0.55))
    shapes: list[Shape] = []
    boxes: list[tuple[float, float, float, float]] = []
    wanted = int(rng.integers(1, 7))
    for _ in range(4 * wanted):
        if len(shapes) == wanted:
            break
        shape = _shape(rng, height, width, horizon)
        low, high = shape.outline.min(axis=0), shape.outline.max(axis=0)
        # OpenCV's outlines have the centre of pixel 0 at 0; in boxes, pixel 0 is from 0 to 1.
        box = (float(low[0]), float(low[1]), float(high[0]) + 1, float(high[1]) + 1)
        if all(overlap(box, other) < 0.15 for other in boxes):
            shapes.append(shape)
            boxes.append(box)
    order = sorted(range(len(shapes)), key=lambda i: boxes[i][3])  # from far to near
    return Layout(
        size=(height, width),
        boxes=np.array([boxes[i] for i in order], np.float32).reshape(-1, 4),
        labels=np.array([shapes[i].label for i in order], np.int64),
        shapes=tuple(shapes[i] for i in order),
        horizon=horizon,
    )


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The intersection of two boxes (xyxy) over the area of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


# Each class prefers a hue, so a small network learns it soon. Hues overlap, so shape matters too.
_HUES = (0, 28, 56, 84, 112, 140)  # of 168 (of OpenCV's 180)


def _shape(rng: np.random.Generator, height: int, width: int, horizon: int) -> Shape:
    label = int(rng.integers(1, len(CLASSES) + 1))
    # Nearer (lower in the picture) is larger.
    ground = rng.uniform(0.15, 1.0)
    radius = float((0.05 + 0.14 * ground) * min(height, width) * rng.uniform(0.75, 1.25))
    bottom = horizon + ground * (height - horizon)
    x = float(rng.uniform(radius + 2, width - radius - 3))
    y = float(min(max(bottom - radius, radius + 2), height - radius - 3))
    angle = float(rng.uniform(-0.35, 0.35))
    hue = (_HUES[label - 1] + rng.normal(0, 5)) % 180
    value, saturation = rng.uniform(150, 250), rng.uniform(150, 240)
    pixel = np.array([[[hue, saturation, value]]], np.uint8)
    red, green, blue = cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return Shape(
        label=label,
        outline=_outline(CLASSES[label - 1], angle) * np.float32(radius)
        + np.array((x, y), np.float32),
        centre=(x, y),
        radius=radius,
        colour=(red, green, blue),
        stripes=float(rng.uniform(0, 9)),
        angle=angle,
    )


def _outline(name: str, angle: float) -> np.ndarray:
    """The outline of a class in the unit circle, turned by `angle` (radians)."""
    points = _UNIT[name]
    turn = np.array(
        ((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))), np.float32
    )
    return points @ turn


def _circle(count: int) -> np.ndarray:
    at = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack((np.cos(at), np.sin(at)), axis=1).astype(np.float32)


def _star() -> np.ndarray:
    points = _circle(10) @ np.array(((0, -1), (1, 0)), np.float32)
    points[1::2] *= 0.45
    return points


_UNIT = {
    "ball": _circle(48),
    "box": np.array(((-0.8, -0.6), (0.8, -0.6), (0.8, 0.6), (-0.8, 0.6)), np.float32),
    "cone": np.array(((0, -1), (0.75, 0.65), (-0.75, 0.65)), np.float32),
    "star": _star(),
    "ring": _circle(48),
    "cross": np.array(
        (
            (-0.3, -0.95),
            (0.3, -0.95),
            (0.3, -0.3),
            (0.95, -0.3),
            (0.95, 0.3),
            (0.3, 0.3),
            (0.3, 0.95),
            (-0.3, 0.95),
            (-0.3, 0.3),
            (-0.95, 0.3),
            (-0.95, -0.3),
            (-0.3, -0.3),
        ),
        np.float32,
    ),
}


# --- painting --------------------------------------------------------------------------------


def render(seed: int, index: int) -> np.ndarray:
    """Picture `index` of the set `seed`: HWC RGB uint8, sized as its layout says."""
    picture = layout(seed, index)
    rng = np.random.default_rng((seed, index, 1))
    image = _landscape(rng, picture.size, picture.horizon)
    light = float(rng.uniform(-0.8, 0.8))
    for shape in picture.shapes:
        _paint(image, shape, light)
    grain = _window(rng, picture.size, _grain())
    return cv2.add(image, cv2.merge((grain, grain, grain)), dtype=cv2.CV_8U)


def _landscape(rng: np.random.Generator, size: tuple[int, int], horizon: int) -> np.ndarray:
    height, width = size
    rough = _window(rng, size, _clouds())  # float32, about -1..1
    sky_top, sky_low = np.array(((70, 120, 200), (190, 210, 235)), np.float32) + rng.normal(
        0, 18, (2, 3)
    )
    ground_far, ground_near = np.array(((120, 130, 90), (80, 95, 50)), np.float32) + rng.normal(
        0, 22, (2, 3)
    )
    column = np.empty((height, 3), np.float32)
    column[:horizon] = np.linspace(sky_top, sky_low, horizon)
    column[horizon:] = np.linspace(ground_far, ground_near, height - horizon)
    strength = np.empty(height, np.float32)
    strength[:horizon] = np.linspace(28, 10, horizon)
    strength[horizon:] = np.linspace(12, 60, height - horizon)
    shade = rough * strength[:, None]
    image = cv2.merge([column[:, i : i + 1] + shade for i in range(3)])
    # Hills stand in front of the sky.
    ridge = (
        horizon
        - 4
        - np.abs(
            cv2.resize(rng.normal(0, 0.06, (1, 9)), (width, 1), interpolation=cv2.INTER_CUBIC)[0]
        )
        * height
    )
    points = np.stack((np.arange(width), np.maximum(ridge, 1)), axis=1)
    hills = np.concatenate((points, ((width, horizon), (0, horizon)))).astype(np.int32)
    mask = np.zeros(size, np.uint8)
    cv2.fillPoly(mask, [hills], 255)
    tone = (ground_far * 0.55 + sky_low * 0.35).clip(0, 255)
    hill = cv2.merge([np.float32(tone[i]) + 18 * rough for i in range(3)])
    cv2.copyTo(hill, mask, image)
    return cv2.convertScaleAbs(cv2.max(image, 0.0))


def _paint(image: np.ndarray, shape: Shape, light: float) -> None:
    height, width = image.shape[:2]
    x, y = shape.centre
    radius = shape.radius
    reach = int(radius * 1.7) + 3
    left, top = max(int(x) - reach, 0), max(int(y) - reach, 0)
    right, bottom = min(int(x) + reach, width), min(int(y) + reach, height)
    part = image[top:bottom, left:right]
    corner = np.array((left, top), np.float32)

    mask = np.zeros(part.shape[:2], np.uint8)
    _fill(mask, shape.outline - corner, 255)
    if CLASSES[shape.label - 1] == "ring":
        _fill(mask, (shape.outline - shape.centre) * np.float32(0.55) + shape.centre - corner, 0)

    # Its shadow lies on the ground, away from the light.
    shadow = np.zeros(part.shape[:2], np.uint8)
    foot = float(shape.outline[:, 1].max())
    middle = (int(x - left + light * radius * 0.5), int(foot - top - radius * 0.04))
    cv2.ellipse(
        shadow, middle, (int(radius * 0.95), max(2, int(radius * 0.22))), 0, 0, 360, 150, -1
    )
    shadow = cv2.blur(shadow, (int(radius * 0.25) | 1, int(radius * 0.12) | 1))
    dark = cv2.merge([shadow] * 3)
    part[:] = cv2.multiply(part, cv2.bitwise_not(dark), scale=1 / 255)

    # Lit from above and one side, striped across.
    across = (np.arange(left, right, dtype=np.float32) - np.float32(x)) / np.float32(radius)
    down = (np.arange(top, bottom, dtype=np.float32) - np.float32(y)) / np.float32(radius)
    lit = (
        np.float32(0.85)
        - np.float32(0.28) * down[:, None]
        - np.float32(light * 0.25) * across[None, :]
    )
    turned = across[None, :] * np.float32(math.cos(shape.angle)) + down[:, None] * np.float32(
        math.sin(shape.angle)
    )
    lit += np.float32(0.13) * np.sin(turned * np.float32(2 + shape.stripes))
    if CLASSES[shape.label - 1] == "ball":
        shine = (across[None, :] + np.float32(light * 0.4)) ** 2 + (
            down[:, None] + np.float32(0.45)
        ) ** 2
        lit += np.float32(0.5) * np.exp(shine * np.float32(-9))
    paint = cv2.merge(
        [np.clip(lit * np.float32(value), 0, 255).astype(np.uint8) for value in shape.colour]
    )
    alpha = cv2.merge([mask] * 3)
    part[:] = cv2.add(
        cv2.multiply(part, cv2.bitwise_not(alpha), scale=1 / 255),
        cv2.multiply(paint, alpha, scale=1 / 255),
    )


def _fill(mask: np.ndarray, outline: np.ndarray, value: int) -> None:
    cv2.fillPoly(mask, [np.round(outline * 16).astype(np.int32)], value, cv2.LINE_AA, 4)


def _window(rng: np.random.Generator, size: tuple[int, int], texture: np.ndarray) -> np.ndarray:
    """A part of a texture that is made once: new noise a picture would double rendering time."""
    top = int(rng.integers(texture.shape[0] - size[0]))
    left = int(rng.integers(texture.shape[1] - size[1]))
    return texture[top : top + size[0], left : left + size[1]]


@functools.cache
def _clouds() -> np.ndarray:
    """(1536, 1536) float32: six octaves of noise, about -1..1."""
    rng = np.random.default_rng(1)
    side = 1536
    total = np.zeros((side, side), np.float32)
    for octave in range(6):
        cells = 6 << octave
        noise = rng.standard_normal((cells, cells), np.float32)
        total += cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC) * np.float32(
            0.5 * 0.62**octave
        )
    return total


@functools.cache
def _grain() -> np.ndarray:
    """(1536, 1536) int16: a camera's noise."""
    noise = np.random.default_rng(2).standard_normal((1536, 1536), np.float32)
    return np.round(noise * 5).astype(np.int16)


# --- the cache -------------------------------------------------------------------------------


def read(seed: int, index: int) -> bytes:
    """The JPEG of a picture, from the cache if it is there.

    Raises:
        UsageError: no folder can be the cache.
    """
    root = cache_dir()
    relative = _relative(seed, index)
    try:
        with open(os.path.join(root, relative), "rb") as file:
            return file.read()
    except FileNotFoundError:
        data = _jpeg(seed, index)
        with contextlib.suppress(OSError):  # a full disk costs time, not pictures
            Location.of(root).write(relative, data, tmp="tmp")
        return data


TELL_AFTER_S = 2.0
"""How long making photos may take before the user is told how far it is."""
TELL_EVERY_S = 5.0


def render_missing(seed: int, count: int, tell: Callable[[str], None] = log.warning) -> int:
    """Render those of the first `count` pictures that the cache lacks, with a thread a core.

    Args:
        tell: told in a line how far it is, after TELL_AFTER_S and then every TELL_EVERY_S. The
            default is a warning, which Python shows where nobody has set up logging.

    Returns:
        How many were missing.
    """
    root = cache_dir()
    missing = sorted(set(range(count)) - set(_cached(root, seed, count)))
    if missing:
        _clouds(), _grain()  # here once, instead of once a thread
        begun = time.monotonic()
        due = begun + TELL_AFTER_S
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, _ in enumerate(pool.map(functools.partial(read, seed), missing), 1):
                if (now := time.monotonic()) >= due:
                    due = now + TELL_EVERY_S
                    left_s = (now - begun) * (len(missing) - done) / done
                    tell(
                        f"Making demo photos, once: {done} of {len(missing)} done, "
                        f"about {left_s:.0f} s left"
                    )
    return len(missing)


def _cached(root: str, seed: int, count: int) -> Iterable[int]:
    for first in range(0, count, 1000):
        folder = os.path.dirname(os.path.join(root, _relative(seed, first)))
        if os.path.isdir(folder):
            yield from (int(name[:-4]) for name in os.listdir(folder) if name.endswith(".jpg"))


def _relative(seed: int, index: int) -> str:
    return f"{seed}/{index // 1000:03d}/{index:06d}.jpg"


def _jpeg(seed: int, index: int) -> bytes:
    image = cv2.cvtColor(render(seed, index), cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return data.tobytes()


def cache_dir() -> str:
    """The cache's folder, which exists and is writable.

    Raises:
        UsageError: there is none.
    """
    return _cache_dir(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    )


@functools.cache
def _cache_dir(base: str) -> str:
    temporary = os.path.join(tempfile.gettempdir(), f"raypipe-{_user()}")
    for parent in (os.path.join(base, "raypipe"), temporary):
        folder = os.path.join(parent, f"demo-v{_VERSION}")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UsageError(
        f"demo images can be stored neither under {base} nor under {temporary}; let XDG_CACHE_HOME "
        "name a folder to write to"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user id without a name, as in containers
        return str(os.getuid())
