"""The OpenCV backend: decoding, every plain op, the finish, encoding.

Images are HWC RGB uint8 arrays. This module never imports torch.
"""

import functools
from collections.abc import Sequence

import cv2
import numpy as np

from raypipe.errors import UsageError
from raypipe.images import resize
from raypipe.images.decode import c_messages, check_size, decode_by_pillow, orient
from raypipe.images.decode import decode as decode_any
from raypipe.images.header import Header
from raypipe.images.ops import augment, colour, filters, geometry
from raypipe.images.ops.op import Op
from raypipe.images.recipe import Finish, Recipe, check_ops

_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_COLOUR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_BORDERS = {
    "constant": cv2.BORDER_CONSTANT,
    "reflect": cv2.BORDER_REFLECT_101,
    "symmetric": cv2.BORDER_REFLECT,
    "edge": cv2.BORDER_REPLICATE,
}


def setup(threads: int) -> None:
    """Set the threads of OpenCV in this process. Its default, all cores, is too many for actors."""
    cv2.setNumThreads(threads)


def check(recipe: Recipe) -> None:
    """Raise UsageError if the recipe has an op that OpenCV cannot execute."""
    check_ops(recipe, apply, "opencv", {})


def decode(
    data: bytes,
    header: Header,
    reduce: int = 1,
    *,
    decoder: str = "simplejpeg",
    strict: bool = True,
) -> np.ndarray:
    """Decode to HWC RGB uint8, upright.

    Args:
        reduce: decode a JPEG at 1/`reduce` (1, 2, 4, 8) of its size, rounded up.
        decoder: of JPEGs, one of DECODERS. "own" is OpenCV's, which does not report most damage.
        strict: reject damaged images, as `raypipe.images.decode.decode`.

    Raises:
        Reject: it cannot be decoded, or is damaged.
    """
    if decoder == "own" and header.native:
        return _by_opencv(data, header, reduce)
    return decode_any(data, header, reduce, strict=strict)


def _by_opencv(data: bytes, header: Header, reduce: int) -> np.ndarray:
    try:
        with c_messages:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), _COLOUR | _REDUCED[reduce])
    except cv2.error:
        image = None
    # OpenCV decodes some images that Pillow rejects, so Pillow decides.
    if image is None or c_messages.appeared():
        return decode_by_pillow(data, header, reduce)
    return check_size(orient(image, header.orientation), header, reduce)


def execute(image: np.ndarray, plan: Sequence[Op], out: np.ndarray) -> None:
    """Execute plain ops in order. `out` gets the result: HWC uint8, contiguous, of its size."""
    for op in plan[:-1]:
        image = apply(op, image)
    if plan:
        image = apply(plan[-1], image, out)
    if image is not out:
        np.copyto(out, image)


@functools.singledispatch
def apply(op: Op, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Execute one plain op. It never changes `image`. It may write into `out` and return that.

    Own ops register their function here: @opencv.apply.register.
    """
    raise UsageError(
        f"the opencv backend cannot do {op}; register a function with raypipe.images.opencv.apply"
    )


@apply.register
def _(op: geometry.Resize, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    if op.antialias and (image.shape[0] > op.height or image.shape[1] > op.width):
        return resize.antialiased(image, op.height, op.width, out)
    if op.arithmetic == "float":
        return resize.in_float(image, op, out)
    if op.area:
        return cv2.resize(image, (op.width, op.height), dst=out, interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (op.width, op.height), dst=out, interpolation=cv2.INTER_LINEAR)


@apply.register
def _(op: geometry.Crop, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    return image[op.top : op.top + op.height, op.left : op.left + op.width]


@apply.register
def _(op: geometry.Flip, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    return cv2.flip(image, 1 if op.axis == "horizontal" else 0, dst=out)


@apply.register
def _(op: geometry.Pad, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    return cv2.copyMakeBorder(
        image,
        op.top,
        op.bottom,
        op.left,
        op.right,
        _BORDERS[op.mode],
        dst=out,
        value=tuple(map(float, op.fill)),
    )


@apply.register
def _(op: geometry.Affine, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    matrix = np.array(op.matrix, np.float64).reshape(2, 3)
    # Whole numbers are pixel edges here, and pixel centres in OpenCV.
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    size = (image.shape[1], image.shape[0])
    return cv2.warpAffine(
        image, matrix, size, dst=out, flags=cv2.INTER_LINEAR, borderValue=tuple(map(float, op.fill))
    )


@apply.register
def _(op: colour.Brightness, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    return cv2.LUT(image, _table(_LEVELS * np.float32(op.factor)), dst=out)


@apply.register
def _(op: colour.Contrast, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    mean = cv2.mean(_luma(image))[0]
    return cv2.LUT(
        image, _table(_LEVELS * np.float32(op.factor) + np.float32((1 - op.factor) * mean)), dst=out
    )


@apply.register
def _(op: colour.Saturation, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    grey = cv2.cvtColor(_luma(image), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, op.factor, grey, 1 - op.factor, _CUT, dst=out)


@apply.register
def _(op: colour.Hue, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    hsv = cv2.cvtColor(image.astype(np.float32) * np.float32(1 / 255), cv2.COLOR_RGB2HSV)
    hsv[..., 0] += np.float32(360 * op.shift)
    hsv[..., 0] %= np.float32(360)
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return cv2.convertScaleAbs(rgb, dst=out, alpha=255.999, beta=_CUT)


@apply.register
def _(op: colour.Permute, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    if out is None:
        out = np.empty_like(image, order="C")
    cv2.mixChannels(
        [image], [out], [part for new, old in enumerate(op.order) for part in (old, new)]
    )
    return out


@apply.register
def _(op: colour.Greyscale, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    return cv2.cvtColor(_luma(image), cv2.COLOR_GRAY2RGB, dst=out)


@apply.register
def _(op: colour.Gamma, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    values = np.clip(
        np.float32(op.gain) * (_LEVELS / np.float32(255)) ** np.float32(op.gamma), 0, 1
    )
    return cv2.LUT(image, _table(values * np.float32(255.999)), dst=out)


@apply.register
def _(op: colour.Equalize, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    tables = [
        _equalized(np.bincount(image[..., channel].ravel(), minlength=256)) for channel in range(3)
    ]
    return cv2.LUT(image, np.stack(tables, axis=-1)[None], dst=out)


@apply.register
def _(op: colour.AutoContrast, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    tables = []
    for channel in range(3):
        low, high, _, _ = cv2.minMaxLoc(cv2.extractChannel(image, channel))
        step = np.float32(high - low) * np.float32(1 / 255)
        tables.append(_table((_LEVELS - np.float32(low)) / step if high > low else _LEVELS))
    return cv2.LUT(image, np.stack(tables, axis=-1)[None], dst=out)


@apply.register
def _(op: filters.Sharpness, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    if min(image.shape[:2]) <= 2:
        return image
    blurred = cv2.filter2D(image, -1, _SMOOTH)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        blurred[edge] = image[edge]
    return cv2.addWeighted(image, op.factor, blurred, 1 - op.factor, _CUT, dst=out)


@apply.register
def _(op: colour.CLAHE, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2Lab)
    clahe = cv2.createCLAHE(op.clip_limit, (op.tiles, op.tiles))
    cv2.insertChannel(clahe.apply(cv2.extractChannel(lab, 0)), lab, 0)
    return cv2.cvtColor(lab, cv2.COLOR_Lab2RGB, dst=out)


@apply.register
def _(op: filters.GaussianBlur, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    return cv2.GaussianBlur(
        image, (op.kernel, op.kernel), op.sigma, dst=out, borderType=cv2.BORDER_REFLECT_101
    )


@apply.register
def _(op: filters.Median, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    return cv2.medianBlur(image, op.kernel, dst=out)


@apply.register
def _(op: filters.Bilateral, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    return cv2.bilateralFilter(
        np.ascontiguousarray(image), op.diameter, op.sigma_colour, op.sigma_space, dst=out
    )


@apply.register
def _(op: filters.NonLocalMeans, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    return cv2.fastNlMeansDenoisingColored(
        image, None, op.strength, op.colour_strength, op.patch, op.search
    )


@apply.register
def _(op: augment.AddNoise, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    noisy = op.noise((image.shape[0], image.shape[1]))
    noisy += image
    np.rint(noisy, out=noisy)
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)


@apply.register
def _(op: augment.Erase, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    erased = image.copy()
    erased[op.top : op.top + op.height, op.left : op.left + op.width] = op.fill
    return erased


_LEVELS = np.arange(256, dtype=np.float32)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_CUT = -0.4999  # OpenCV rounds where torchvision truncates: less this, rounding truncates
_LUMA = np.array([[0.2989, 0.587, 0.114, _CUT]])


def _luma(image: np.ndarray) -> np.ndarray:
    """Grey as torchvision has it: with its weights, whose sum is 0.9999, truncated."""
    return cv2.transform(image, _LUMA)


def _table(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _equalized(histogram: np.ndarray) -> np.ndarray:
    """The table of Pillow's equalize, uint8 (256,).

    Each step of the output gets an equal number of pixels, by integer division. Pixels of the
    brightest value are not counted.
    """
    used = np.flatnonzero(histogram)
    step = (histogram.sum() - histogram[used[-1]]) // 255
    if step == 0:
        return np.arange(256, dtype=np.uint8)
    before = np.concatenate([[0], np.cumsum(histogram)[:-1]])
    return np.clip((before + step // 2) // step, 0, 255).astype(np.uint8)


def finish(batch: np.ndarray | Sequence[np.ndarray], finish: Finish) -> np.ndarray:
    """Finish a batch of uint8 images, NHWC or a sequence of HWC.

    Looked up in a table: the fastest of six ways tried, and each value is rounded once.

    Returns:
        NCHW or NHWC, of the finish's dtype, padded if it says so.

    Raises:
        UsageError: sizes differ, and the finish has no `pad_multiple`.
    """
    height, width = finish.padded_size([image.shape[:2] for image in batch])
    full = all(image.shape[:2] == (height, width) for image in batch)
    shape = (
        (len(batch), 3, height, width) if finish.layout == "chw" else (len(batch), height, width, 3)
    )
    result = (np.empty if full else np.zeros)(shape, np.float32)
    table = _finish_table(finish)
    order = (0, 1, 2) if finish.channels == "rgb" else (2, 1, 0)
    for image, target in zip(batch, result, strict=True):
        rows, columns = image.shape[:2]
        if finish.layout == "chw":
            for new, old in enumerate(order):
                part = target[new, :rows, :columns]
                values = cv2.LUT(cv2.extractChannel(image, old), table[new], dst=part)
                assert values is part
        else:
            part = target[:rows, :columns]
            ordered = image if finish.channels == "rgb" else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            values = cv2.LUT(ordered, table.T[None], dst=part)
            assert values is part
    return result.astype(finish.dtype, copy=False)


@functools.cache
def _finish_table(finish: Finish) -> np.ndarray:
    return finish.table()


def encode(image: np.ndarray, format: str, quality: int) -> bytes:
    """Encode HWC RGB uint8 as "jpeg" (4:2:0, baseline, standard tables) or "png".

    JPEGs are the same bytes as the torchvision backend's. PNGs hold the same pixels and take half
    the time. OpenCV uses one filter and run-length matching, 12 ms for 640x480; Pillow chooses a
    filter for each row, 26 ms.

    Args:
        quality: of a JPEG; ignored for a PNG.
    """
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    if format == "jpeg":
        settings = [
            cv2.IMWRITE_JPEG_QUALITY,
            quality,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        ]
        done, data = cv2.imencode(".jpg", bgr, settings)
    elif format == "png":
        done, data = cv2.imencode(".png", bgr)
    else:
        raise UsageError(f"images are encoded as jpeg or png, not {format!r}")
    assert done, f"OpenCV could not encode {image.shape} as {format}"
    return data.tobytes()
