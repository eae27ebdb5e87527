"""How much memory decoding and transforming an image takes, estimated before either starts.

Bytes a pixel were measured as the peak of the process (VmHWM) on images of 20 megapixels.
"""

from collections.abc import Sequence

from raypipe.images.header import Header
from raypipe.images.ops import augment, colour, filters, geometry
from raypipe.images.ops.op import Op, Size, as_op

_DECODING = {
    "jpeg": 13,
    "png": 9,
    "bmp": 8,
    "gif": 8,
    "webp": 17,
    "avif": 16,
    "heif": 16,
    "tiff": 16,
    "npy": 6,
}
"""Bytes a pixel while an image of each format is decoded, the result included."""

_ONE_SCAN, _SEVERAL_SCANS = 3, 9
"""The same for a JPEG that simplejpeg decodes. Several scans need all coefficients at once."""

_TURNED = 3

SCRATCH: dict[str, dict[type, float]] = {
    "opencv": {
        augment.AddNoise: 15,
        augment.Erase: 1,
        colour.AutoContrast: 1,
        colour.Brightness: 0,
        colour.CLAHE: 5,
        colour.Contrast: 1,
        colour.Equalize: 8,
        colour.Gamma: 1,
        colour.Greyscale: 1,
        colour.Hue: 27,
        colour.Permute: 0,
        colour.Saturation: 3,
        filters.Bilateral: 3,
        filters.GaussianBlur: 1,
        filters.Median: 1,
        filters.NonLocalMeans: 20,
        filters.Sharpness: 3,
        geometry.Affine: 0,
        geometry.Crop: 0,
        geometry.Flip: 0,
        geometry.Pad: 0,
        geometry.Resize: 15,
    },
    "torchvision": {
        augment.AddNoise: 36,
        augment.Erase: 2,
        colour.AutoContrast: 15,
        colour.Brightness: 24,
        colour.Contrast: 28,
        colour.Equalize: 30,
        colour.Gamma: 27,
        colour.Greyscale: 8,
        colour.Hue: 98,
        colour.Permute: 2,
        colour.Saturation: 28,
        filters.GaussianBlur: 140,
        filters.Sharpness: 153,
        geometry.Affine: 36,
        geometry.Crop: 2,
        geometry.Flip: 2,
        geometry.Pad: 2,
        geometry.Resize: 2,
    },
}
"""What an op of a backend takes beside its input and output: bytes a pixel of the larger one."""

UNKNOWN_OP = 30
"""Bytes a pixel assumed for an own op: one or two float32 copies."""

MOST = 170
"""Bytes a pixel that no image exceeds, whatever its recipe. With that many free, skip `needed`."""


def needed(header: Header, ops: Sequence[Op], backend: str, *, reduce: int = 1) -> int:
    """The peak memory in bytes while an image is decoded and goes through plain `ops`.

    Its encoded bytes are not counted.

    Args:
        backend: "opencv" or "torchvision".
        reduce: a JPEG is decoded at 1/`reduce` of its size.
    """
    pixels = header.height * header.width
    if header.native:
        decoding = (
            pixels * (_SEVERAL_SCANS - 3 if header.scans else 0) + pixels // reduce**2 * _ONE_SCAN
        )
    else:
        reduce, decoding = 1, pixels * _DECODING[header.format]
    if header.orientation > 1:
        decoding += pixels // reduce**2 * _TURNED
    size: Size = (-(-header.height // reduce), -(-header.width // reduce))
    most = float(decoding)
    for op in ops:
        after = as_op(op).output_size(size)
        before, behind = size[0] * size[1], after[0] * after[1]
        # A resize works on rows first, so its scratch has the size in between.
        worked_on, in_float = max(before, behind), 0
        if isinstance(op, geometry.Resize):
            worked_on = max(after[0] * size[1], behind)
            # torchvision resizes uint8 as float where torch finds no AVX2; 0.23 also with AVX512.
            as_float = op.arithmetic == "float" or backend == "torchvision"
            in_float = 12 * (before + behind) if as_float else 0
        beside = SCRATCH[backend].get(type(op), UNKNOWN_OP) * worked_on
        most = max(most, 3 * (before + behind) + beside + in_float)
        size = after
    return int(most)
