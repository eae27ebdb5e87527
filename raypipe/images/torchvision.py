"""The torchvision backend: decoding, every plain op, the finish, encoding.

JPEGs are decoded by simplejpeg, or by Pillow as torchvision's own decoder. Images are CHW RGB uint8
tensors whose memory is HWC (channels last): torchvision resizes these twice as fast. Every op also
executes a batch of images of one size, (n, 3, height, width), on the device they are on. So a
recipe's ops can run on the GPU that trains.
"""

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms.v2 import functional

from raypipe.errors import UsageError
from raypipe.images.decode import decode as decode_any
from raypipe.images.decode import decode_by_pillow
from raypipe.images.header import Header
from raypipe.images.ops import augment, colour, filters, geometry
from raypipe.images.ops.op import Op
from raypipe.images.recipe import Finish, Recipe, check_ops

_OPENCV_ONLY = "torchvision has no such filter: use --backend opencv, or another op"
_REMEDIES = dict.fromkeys(
    (colour.CLAHE, filters.Median, filters.Bilateral, filters.NonLocalMeans), _OPENCV_ONLY
)


def setup(threads: int) -> None:
    """Set the threads in this process of torch, and of OpenCV, which turns images upright."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def check(recipe: Recipe) -> None:
    """Raise UsageError if the recipe has an op that torchvision cannot execute."""
    check_ops(recipe, apply, "torchvision", _REMEDIES)


def decode(
    data: bytes,
    header: Header,
    reduce: int = 1,
    *,
    decoder: str = "simplejpeg",
    strict: bool = True,
) -> torch.Tensor:
    """Decode to CHW RGB uint8, upright.

    Args:
        reduce: decode a JPEG at 1/`reduce` (1, 2, 4, 8) of its size, rounded up.
        decoder: of JPEGs, one of DECODERS. "own" is Pillow's, which does not report most damage.
        strict: reject damaged images, as `raypipe.images.decode.decode`.

    Raises:
        Reject: it cannot be decoded, or is damaged.
    """
    if decoder == "own" and header.native:
        pixels = decode_by_pillow(data, header, reduce)
    else:
        pixels = decode_any(data, header, reduce, strict=strict)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def execute(image: torch.Tensor, plan: Sequence[Op], out: np.ndarray) -> None:
    """Execute plain ops in order. `out` gets the result: HWC uint8, contiguous, of its size."""
    for op in plan:
        image = apply(op, image)
    torch.from_numpy(out).permute(2, 0, 1).copy_(image)


@functools.singledispatch
def apply(op: Op, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    """Execute one plain op on (..., 3, height, width) uint8. It never changes `image`.

    Own ops register their function here: @torchvision.apply.register.

    Args:
        out: as in the OpenCV backend. Not used: torchvision cannot write into given memory.
    """
    raise UsageError(
        f"the torchvision backend cannot do {op}; register a function with "
        "raypipe.images.torchvision.apply"
    )


@apply.register
def _(op: geometry.Resize, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    # A crop is copied first, channels last: this saves a third of the time. Plain CHW is slower.
    if image.ndim == 3 and not image.is_contiguous():
        image = image[None].contiguous(memory_format=torch.channels_last)[0]
    if op.area:
        with _one_thread():
            return _by_area(image, op.height, op.width)
    if op.arithmetic == "float":
        with _one_thread():
            image = functional.resize(
                image.to(torch.float32),
                [op.height, op.width],
                interpolation=functional.InterpolationMode.BILINEAR,
                antialias=False,
            )
        if op.rounding == "nearest":
            image = image.round_()
        return image.clamp_(0, 255).to(torch.uint8)
    return functional.resize(
        image,
        [op.height, op.width],
        interpolation=functional.InterpolationMode.BILINEAR,
        antialias=op.antialias,
    )


@apply.register
def _(op: geometry.Crop, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return image[..., op.top : op.top + op.height, op.left : op.left + op.width]


@apply.register
def _(op: geometry.Flip, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return (
        functional.horizontal_flip(image)
        if op.axis == "horizontal"
        else functional.vertical_flip(image)
    )


@apply.register
def _(op: geometry.Pad, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    if op.mode == "constant":
        return functional.pad(image, [op.left, op.top, op.right, op.bottom], fill=list(op.fill))
    # torch has no border wider than the image, so rows and columns are picked by index.
    rows, columns = (
        torch.from_numpy(np.pad(np.arange(length), border, mode=op.mode)).to(image.device)
        for length, border in (
            (image.shape[-2], (op.top, op.bottom)),
            (image.shape[-1], (op.left, op.right)),
        )
    )
    return image[..., rows[:, None], columns]


@apply.register
def _(op: geometry.Affine, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    height, width = image.shape[-2:]
    images = image.reshape(-1, 3, height, width)
    forward = np.vstack([np.array(op.matrix, np.float64).reshape(2, 3), [0, 0, 1]])
    # grid_sample has coordinates from -1 to 1, and maps from the result to the image.
    pixels = np.array([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])
    theta = torch.from_numpy((np.linalg.inv(pixels) @ np.linalg.inv(forward) @ pixels)[:2]).to(
        image.device, torch.float32
    )
    grid = affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    fill = torch.tensor(op.fill, dtype=torch.float32, device=image.device)[:, None, None]
    # grid_sample pads with 0. The fill is subtracted before and added after, so it pads with that.
    moved = grid_sample(
        images - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return (moved + fill).round_().clamp_(0, 255).to(torch.uint8).reshape(image.shape)


@apply.register
def _(op: colour.Brightness, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    # An int factor would wrap around: torchvision multiplies uint8 by it without clipping.
    return functional.adjust_brightness(image, float(op.factor))


@apply.register
def _(op: colour.Contrast, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_contrast(image, float(op.factor))


@apply.register
def _(op: colour.Saturation, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_saturation(image, float(op.factor))


@apply.register
def _(op: colour.Hue, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_hue(image, float(op.shift))


@apply.register
def _(op: colour.Permute, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return image[..., list(op.order), :, :]


@apply.register
def _(op: colour.Greyscale, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.rgb_to_grayscale(image, num_output_channels=3)


@apply.register
def _(op: colour.Gamma, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_gamma(image, float(op.gamma), float(op.gain))


@apply.register
def _(op: colour.Equalize, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.equalize(image)


@apply.register
def _(op: colour.AutoContrast, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.autocontrast(image)


@apply.register
def _(op: filters.Sharpness, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_sharpness(image, float(op.factor))


@apply.register
def _(op: filters.GaussianBlur, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.gaussian_blur(image, [op.kernel, op.kernel], [op.sigma, op.sigma])


@apply.register
def _(op: augment.AddNoise, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    noisy = (
        torch.from_numpy(op.noise((image.shape[-2], image.shape[-1])))
        .permute(2, 0, 1)
        .to(image.device)
    )
    return (noisy + image).round_().clamp_(0, 255).to(torch.uint8)


@apply.register
def _(op: augment.Erase, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    fill = torch.tensor(op.fill, dtype=torch.uint8, device=image.device)[:, None, None]
    return functional.erase(image, op.top, op.left, op.height, op.width, fill)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch in one thread inside `with`, so that results never depend on --threads.

    Float sums depend on how torch splits an image among threads: with two threads up to 4.2% of the
    values were 1 off.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _by_area(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize (..., 3, height, width) uint8 as cv2.INTER_AREA: the mean of what a new pixel covers.

    At most 1 off OpenCV's result; 3 where it enlarges.
    """
    pixels = image.to(torch.float32)
    rows = _area_weights(image.shape[-2], height).to(image.device)
    columns = _area_weights(image.shape[-1], width).to(image.device)
    return (
        torch.matmul(torch.matmul(rows, pixels), columns.T).round_().clamp_(0, 255).to(torch.uint8)
    )


@functools.lru_cache(maxsize=256)
def _area_weights(old: int, new: int) -> torch.Tensor:
    """The share of each old pixel in each new one, float32 (new, old).

    Enlarging is linear between pixel centres, as in OpenCV.
    """
    scale = 1 / (new / old)  # OpenCV's formula: equal to the last bit
    weights = np.zeros((new, old))
    for at in range(new):
        if scale >= 1:
            inside = np.clip(
                np.minimum(np.arange(1, old + 1), (at + 1) * scale)
                - np.maximum(np.arange(old), at * scale),
                0,
                None,
            )
            weights[at] = inside / inside.sum()
            continue
        first = int(np.floor(at * scale))
        part = (at + 1) - (first + 1) * (new / old)
        part = 0.0 if part <= 0 else part - np.floor(part)
        weights[at, min(first, old - 1)] += 1 - part
        weights[at, min(first + 1, old - 1)] += part
    return torch.from_numpy(weights).to(torch.float32)


def finish(batch: torch.Tensor | Sequence[torch.Tensor], finish: Finish) -> torch.Tensor:
    """Finish a batch of uint8 images, NHWC or a sequence of HWC, on the device they are on.

    Returns:
        NCHW or NHWC, of the finish's dtype, padded if it says so. Its memory is channels last, with
        which GPUs compute fastest.

    Raises:
        UsageError: sizes differ, and the finish has no `pad_multiple`.
    """
    height, width = finish.padded_size([(image.shape[0], image.shape[1]) for image in batch])
    if isinstance(batch, torch.Tensor) and batch.shape[1:3] == (height, width):
        result = _normalised(batch, finish)
    else:
        device = batch[0].device if len(batch) else None
        result = torch.zeros(
            (len(batch), height, width, 3), dtype=getattr(torch, finish.dtype), device=device
        )
        for image, target in zip(batch, result, strict=True):
            target[: image.shape[0], : image.shape[1]] = _normalised(image, finish)
    return result.permute(0, 3, 1, 2) if finish.layout == "chw" else result


def _normalised(pixels: torch.Tensor, finish: Finish) -> torch.Tensor:
    """Normalise channels-last pixels; the constants are computed in float64."""
    std = np.array(finish.std)
    factor, shift = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device)
        for values in (finish.scale / std, -np.array(finish.mean) / std)
    )
    ordered = pixels.flip(-1) if finish.channels == "bgr" else pixels
    return ordered.to(torch.float32).mul_(factor).add_(shift).to(getattr(torch, finish.dtype))


def encode(image: np.ndarray, format: str, quality: int) -> bytes:
    """Encode HWC RGB uint8 as "jpeg" (4:2:0, baseline, standard tables) or "png".

    Args:
        quality: of a JPEG; ignored for a PNG.
    """
    file = io.BytesIO()
    if format == "jpeg":
        Image.fromarray(image).save(
            file, "JPEG", quality=quality, subsampling="4:2:0", optimize=False, progressive=False
        )
    elif format == "png":
        # compress_type 3: run-length matching, as OpenCV.
        Image.fromarray(image).save(file, "PNG", compress_level=1, compress_type=3)
    else:
        raise UsageError(f"images are encoded as jpeg or png, not {format!r}")
    return file.getvalue()
