"""TIFF: samples read by tifffile, converted to 8-bit RGB.

tifffile returns the stored samples of any compression, tiling, planes, byte order and predictor.
Their meaning is decided here. Unclear ones are rejected: Pillow, for example, decodes 16-bit
WhiteIsZero inverted, and misplaces separate planes of 16 bits.
"""

import io
import logging

import cv2
import numpy as np
import tifffile
from PIL import Image

from raypipe.images import jpeg
from raypipe.images.header import Header, Reject
from raypipe.images.orientation import upright

# tifffile's complaints become a Reject, or do not matter.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_SAMPLES = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_JPEG = (6, 7, 33007, 34892)
_PREDICTED = (5, 8, 32946, 34925, 50000)  # LZW, deflate twice, LZMA, Zstandard
_XMP, _ORIENTATION, _INK_SET = 700, 274, 332


def read(data: bytes) -> Header:
    """The header of the first page. Raises what tifffile raises."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        height, width = page.imagelength, page.imagewidth
        tag, xmp = page.tags.get(_ORIENTATION), page.tags.valueof(_XMP, b"")
    said = tag.value if tag is not None and isinstance(tag.value, int) else None
    if said is None:
        said = upright(b"", xmp if isinstance(xmp, bytes) else b"")
    orientation = said if 1 <= said <= 8 else 1
    if orientation >= 5:
        width, height = height, width
    return Header(format="tiff", height=height, width=width, orientation=orientation)


def decode(data: bytes, *, strict: bool) -> np.ndarray:
    """Decode the first page to HWC RGB uint8, without its orientation.

    Raises:
        Reject: it is damaged, or has no mapping to 8-bit RGB. Else what tifffile raises.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        _check(page)
        if strict and page.compression in _JPEG:
            _check_jpegs(page, data)
        if page.photometric == _YCBCR and page.compression not in _JPEG:
            return _by_opencv(data)
        samples = page.asarray(maxworkers=1)
        colours = page.colormap if page.photometric == _PALETTE else None
    shape = (page.imagelength, page.imagewidth, page.samplesperpixel)
    samples = (
        np.moveaxis(samples.reshape(shape[2], *shape[:2]), 0, 2)
        if page.planarconfig == 2
        else samples.reshape(shape)
    )
    samples = samples[..., : _SAMPLES[page.photometric]]  # without alpha and other extra samples
    if colours is not None:
        return np.ascontiguousarray(
            (colours[:, samples[..., 0].astype(np.uint16)] >> 8).astype(np.uint8).transpose(1, 2, 0)
        )
    levels = _as_bytes(samples, page.bitspersample)
    if page.photometric == _CMYK:
        return np.asarray(Image.fromarray(np.ascontiguousarray(levels), mode="CMYK").convert("RGB"))
    if page.photometric == _WHITE_IS_ZERO:
        levels = 255 - levels
    return (
        cv2.cvtColor(np.ascontiguousarray(levels), cv2.COLOR_GRAY2RGB)
        if levels.shape[2] == 1
        else np.ascontiguousarray(levels)
    )


def _check(page: tifffile.TiffPage) -> None:
    """Raise Reject for a page without a certain mapping to 8-bit RGB."""
    photometric, bits = page.photometric, page.bitspersample
    name = getattr(photometric, "name", photometric)
    said = f"{name}, {bits} bits, sample format {page.sampleformat}"
    if page.sampleformat != 1 or not isinstance(bits, int) or bits > 16:
        raise Reject(
            "unsupported mode",
            "only whole numbers of 1 to 16 bits without sign have a range to map to 8 bits; "
            f"this is {said}",
        )
    wanted = _SAMPLES.get(photometric)
    if wanted is None or page.samplesperpixel < wanted or page.imagedepth != 1:
        raise Reject(
            "unsupported mode",
            f"{page.samplesperpixel} samples of {said} are no picture in grey, RGB, palette, CMYK "
            "or YCbCr",
        )
    if photometric == _CMYK and (page.tags.valueof(_INK_SET, 1) != 1 or bits != 8):
        raise Reject("unsupported mode", f"inks other than CMYK of 8 bits: {said}")
    if photometric == _YCBCR and (bits != 8 or page.planarconfig != 1):
        raise Reject("unsupported mode", f"YCbCr other than 8 bits in one plane: {said}")
    if page.predictor != 1 and page.compression not in _PREDICTED:
        raise Reject(
            "unsupported mode",
            f"a predictor with {page.compression!r}, which some readers apply and some do not",
        )
    if page.is_reduced:
        raise Reject(
            "unsupported mode",
            "its first page is a small version of another, as in camera raw files (DNG)",
        )


def _as_bytes(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of `bits` bits as uint8: the high byte, or fewer bits scaled to the whole range."""
    if bits == 8:
        return samples
    if bits > 8:
        return (samples >> (bits - 8)).astype(np.uint8)
    return (samples.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8)


def _check_jpegs(page: tifffile.TiffPage, data: bytes) -> None:
    tables = page.jpegtables
    for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        part = data[start : start + count]
        if tables is not None and part[:2] == b"\xff\xd8":
            part = tables[:-2] + part[2:]
        said = jpeg.damage(part, colours="CMYK" if page.samplesperpixel == 4 else "RGB")
        if said:
            raise Reject("damaged", f"libjpeg: {said}")


def _by_opencv(data: bytes) -> np.ndarray:
    """Decode YCbCr that is not JPEG: libtiff converts it, subsampled or not."""
    image = cv2.imdecode(
        np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    )
    if image is None:
        raise Reject("corrupt", "OpenCV cannot decode it")
    return image
