"""How torchvision does it: decoding (simplejpeg, or Pillow as torchvision's own), every plain op, the finish, encoding.

Images are CHW RGB uint8 tensors whose memory is HWC (channels last): torchvision resizes these twice as fast. Every op also does many images of one
size at once, (n, 3, height, width), and on whatever device they are: so a recipe's ops can be left to the device that trains.
"""

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms.v2 import functional

from raypipe import UsageError
from raypipe.images import recipe as ops
from raypipe.images.decode import Header, decode_by_pillow
from raypipe.images.decode import decode as decode_any
from raypipe.images.recipe import Finish, Recipe, check_ops, noise, padded_size

_OPENCV_ONLY = "torchvision has no such filter: use --backend opencv, or another op"
_REMEDIES = dict.fromkeys((ops.CLAHE, ops.Median, ops.Bilateral, ops.NonLocalMeans), _OPENCV_ONLY)


SCRATCH: dict[type, float] = {
    **dict.fromkeys((ops.Resize, ops.Crop, ops.Flip, ops.Pad, ops.Permute, ops.Erase), 2),
    ops.Greyscale: 8,
    ops.AutoContrast: 15,
    ops.Brightness: 24,
    ops.Gamma: 27,
    ops.Contrast: 28,
    ops.Saturation: 28,
    ops.Equalize: 30,
    ops.AddNoise: 36,
    ops.Affine: 36,
    ops.Hue: 98,
    ops.GaussianBlur: 140,
    ops.Sharpness: 153,
}
"""Bytes a pixel that an op takes beside the image before and after it (measured; `raypipe.images.memory`)."""


def setup(threads: int) -> None:
    """How many threads torch may use in this process, and OpenCV, which turns images upright."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def check(recipe: Recipe) -> None:
    """Raises UsageError if the recipe has an op that torchvision cannot do."""
    check_ops(recipe, apply, "torchvision", _REMEDIES)


def decode(
    data: bytes,
    header: Header,
    reduce: int = 1,
    *,
    decoder: str = "simplejpeg",
    strict: bool = True,
) -> torch.Tensor:
    """Decodes to CHW RGB uint8, upright. A JPEG comes at 1/`reduce` (1, 2, 4, 8) of its size, rounded up.

    Args:
        decoder: of JPEGs, one of DECODERS; "own" is Pillow's, which says nothing of most damage.
        strict: refuse what is damaged, as `raypipe.images.decode.decode`.

    Raises:
        Reject: it cannot be decoded, or is damaged.
    """
    if decoder == "own" and header.native:
        pixels = decode_by_pillow(data, header, reduce)
    else:
        pixels = decode_any(data, header, reduce, strict=strict)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def execute(image: torch.Tensor, plan: Sequence[Any], out: np.ndarray) -> None:
    """Does all ops of a plan and leaves the result in `out`: HWC uint8, contiguous, of the plan's size."""
    for op in plan:
        image = apply(op, image)
    torch.from_numpy(out).permute(2, 0, 1).copy_(image)


@functools.singledispatch
def apply(op: Any, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    """Does one plain op on (..., 3, height, width) uint8; never changes `image`. `out` is there for OpenCV's sake: torchvision cannot write
    into a given place."""
    raise UsageError(
        f"the torchvision backend cannot do {op}; register a function with raypipe.images.torchvision.apply"
    )


@apply.register
def _(op: ops.Resize, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    if (
        image.ndim == 3 and not image.is_contiguous()
    ):  # a crop: gathering it first saves a third of the time; plain CHW would take longer
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
        return (
            (image.round_() if op.rounding == "nearest" else image).clamp_(0, 255).to(torch.uint8)
        )
    return functional.resize(
        image,
        [op.height, op.width],
        interpolation=functional.InterpolationMode.BILINEAR,
        antialias=op.antialias,
    )


@apply.register
def _(op: ops.Crop, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return image[..., op.top : op.top + op.height, op.left : op.left + op.width]


@apply.register
def _(op: ops.Flip, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return (
        functional.horizontal_flip(image)
        if op.axis == "horizontal"
        else functional.vertical_flip(image)
    )


@apply.register
def _(op: ops.Pad, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    if op.mode == "constant":
        return functional.pad(image, [op.left, op.top, op.right, op.bottom], fill=list(op.fill))
    # torch has no border wider than the image: so each new row and column by its number.
    rows, columns = (
        torch.from_numpy(np.pad(np.arange(length), border, mode=op.mode)).to(image.device)
        for length, border in (
            (image.shape[-2], (op.top, op.bottom)),
            (image.shape[-1], (op.left, op.right)),
        )
    )
    return image[..., rows[:, None], columns]


@apply.register
def _(op: ops.Affine, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    height, width = image.shape[-2:]
    images = image.reshape(-1, 3, height, width)
    forward = np.vstack([np.array(op.matrix, np.float64).reshape(2, 3), [0, 0, 1]])
    # grid_sample counts from -1 to 1, and asks where each pixel of the result comes from.
    pixels = np.array([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])
    theta = torch.from_numpy((np.linalg.inv(pixels) @ np.linalg.inv(forward) @ pixels)[:2]).to(
        image.device, torch.float32
    )
    grid = affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    fill = torch.tensor(op.fill, dtype=torch.float32, device=image.device)[:, None, None]
    # Outside is 0 for grid_sample: less the fill before, plus it after, makes that the fill, and blends at the border.
    moved = grid_sample(
        images - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return (moved + fill).round_().clamp_(0, 255).to(torch.uint8).reshape(image.shape)


# float: torchvision multiplies uint8 by a whole number without clipping, so that it wraps around
@apply.register
def _(op: ops.Brightness, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_brightness(image, float(op.factor))


@apply.register
def _(op: ops.Contrast, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_contrast(image, float(op.factor))


@apply.register
def _(op: ops.Saturation, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_saturation(image, float(op.factor))


@apply.register
def _(op: ops.Hue, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_hue(image, float(op.shift))


@apply.register
def _(op: ops.Permute, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return image[..., list(op.order), :, :]


@apply.register
def _(op: ops.Greyscale, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.rgb_to_grayscale(image, num_output_channels=3)


@apply.register
def _(op: ops.Gamma, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_gamma(image, float(op.gamma), float(op.gain))


@apply.register
def _(op: ops.Equalize, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.equalize(image)


@apply.register
def _(op: ops.AutoContrast, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.autocontrast(image)


@apply.register
def _(op: ops.Sharpness, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.adjust_sharpness(image, float(op.factor))


@apply.register
def _(op: ops.GaussianBlur, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    return functional.gaussian_blur(image, [op.kernel, op.kernel], [op.sigma, op.sigma])


@apply.register
def _(op: ops.AddNoise, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    noisy = (
        torch.from_numpy(noise(op, (image.shape[-2], image.shape[-1])))
        .permute(2, 0, 1)
        .to(image.device)
    )
    return (noisy + image).round_().clamp_(0, 255).to(torch.uint8)


@apply.register
def _(op: ops.Erase, image: torch.Tensor, out: np.ndarray | None = None) -> torch.Tensor:
    fill = torch.tensor(op.fill, dtype=torch.uint8, device=image.device)[:, None, None]
    return functional.erase(image, op.top, op.left, op.height, op.width, fill)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Float sums depend on where torch cuts an image for its threads: up to 4.2% of the values were 1 off
    with two threads instead of one. Results never depend on --threads."""
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
    """cv2.INTER_AREA on (..., 3, height, width) uint8: the mean of what each new pixel covers; at most 1 off, enlarging 3."""
    pixels = image.to(torch.float32)
    rows = _area_weights(image.shape[-2], height).to(image.device)
    columns = _area_weights(image.shape[-1], width).to(image.device)
    return (
        torch.matmul(torch.matmul(rows, pixels), columns.T).round_().clamp_(0, 255).to(torch.uint8)
    )


@functools.lru_cache(maxsize=256)
def _area_weights(old: int, new: int) -> torch.Tensor:
    """How much of each old pixel is in each new one, float32 (new, old); enlarging is linear between the centres, as in OpenCV."""
    scale = 1 / (new / old)  # as OpenCV has it, to the last bit
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
    """Turns uint8 images, NHWC or a sequence of HWC, on any device, into what a model wants there: float, padded if asked.

    The result is of shape NCHW or NHWC as the finish says; its memory stays channels last, which is what GPUs compute fastest.
    """
    height, width = padded_size([tuple(image.shape[:2]) for image in batch], finish.pad_multiple)
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
    """Channels last in, channels last out. One multiplication and one addition, in place, with constants made in float64."""
    std = np.array(finish.std)
    factor, shift = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device)
        for values in (finish.scale / std, -np.array(finish.mean) / std)
    )
    ordered = pixels.flip(-1) if finish.channels == "bgr" else pixels
    return ordered.to(torch.float32).mul_(factor).add_(shift).to(getattr(torch, finish.dtype))


def encode(image: np.ndarray, format: str, quality: int) -> bytes:
    """Encodes HWC RGB uint8 as "jpeg" (4:2:0, baseline, standard tables) or "png" (`quality` is ignored)."""
    file = io.BytesIO()
    if format == "jpeg":
        Image.fromarray(image).save(
            file, "JPEG", quality=quality, subsampling="4:2:0", optimize=False, progressive=False
        )
    elif format == "png":
        Image.fromarray(image).save(
            file, "PNG", compress_level=1, compress_type=3
        )  # run-length matching, as OpenCV
    else:
        raise UsageError(f"images are encoded as jpeg or png, not {format!r}")
    return file.getvalue()
