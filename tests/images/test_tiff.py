import io
import itertools

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from raypipe.images.decode import decode, read_header
from raypipe.images.header import Reject
from tests.images.tiffs import COMPRESSIONS, tiff

RNG = np.random.default_rng(0)
RGB = cv2.GaussianBlur(RNG.integers(0, 256, (40, 52, 3), dtype=np.uint8), (5, 5), 1)

_WHITE, _BLACK, _RGB, _PALETTE, _CMYK = 0, 1, 2, 3, 5


def read(data: bytes) -> np.ndarray | str:
    """The image, or the reason of its reject."""
    try:
        header = read_header(data)
        image = decode(data, header)
    except Reject as reject:
        return reject.reason
    assert image.shape == (header.height, header.width, 3)
    return image


def high_byte(samples: np.ndarray, bits: int) -> np.ndarray:
    return (samples >> (bits - 8) if bits >= 8 else samples * 255 // (2**bits - 1)).astype(np.uint8)


def made(photometric: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Samples, the image that they stand for, and the palette."""
    samples = RGB.astype(np.int64) * (2**bits - 1) // 255
    if photometric == _PALETTE:
        colours = np.random.default_rng(bits).integers(0, 256, (3, 2**bits)) * 257
        return (
            samples[..., 1:2],
            (colours[:, samples[..., 1]] >> 8).astype(np.uint8).transpose(1, 2, 0),
            colours,
        )
    if photometric == _CMYK:
        inks = np.dstack([samples, samples[..., :1]])
        return (
            inks,
            np.asarray(Image.fromarray(high_byte(inks, bits), mode="CMYK").convert("RGB")),
            None,
        )
    if photometric == _RGB:
        return samples, high_byte(samples, bits), None
    grey = samples[..., 1:2]
    shown = 255 - high_byte(grey, bits) if photometric == _WHITE else high_byte(grey, bits)
    return grey, np.repeat(shown, 3, axis=2), None


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 14, 16])
@pytest.mark.parametrize("photometric", [_WHITE, _BLACK, _RGB, _PALETTE, _CMYK])
def test_whatever_is_accepted_is_right(photometric, bits):
    """Every combination of photometric, depth, planes, compression, tiling, order and predictor.

    None is decoded wrongly, and few are rejected.
    """
    samples, shown, colours = made(photometric, bits)
    outcomes = []
    for planar, compression, tile, order, predictor in itertools.product(
        (False, True),
        COMPRESSIONS,
        (None, 16),
        "<>",
        (False, True) if bits in (8, 16) else (False,),
    ):
        made_as = {
            "planar": planar,
            "compression": compression,
            "tile": tile,
            "order": order,
            "predictor": predictor,
        }
        image = read(tiff(samples, bits=bits, photometric=photometric, colours=colours, **made_as))
        if predictor and compression != "deflate":  # readers differ in whether there is one then
            assert image == "unsupported mode", made_as
            continue
        if isinstance(image, str):
            assert image == "unsupported mode", made_as
        else:
            np.testing.assert_array_equal(image, shown, err_msg=str(made_as))
        outcomes.append(image)
    rejected = sum(isinstance(image, str) for image in outcomes)
    assert rejected == (len(outcomes) if photometric == _CMYK and bits != 8 else 0)


@pytest.mark.parametrize(
    ("bits", "sample_format"), [(8, 2), (16, 2), (32, 1), (32, 2), (32, 3), (16, 3)]
)
def test_numbers_without_a_range_are_rejected(bits, sample_format):
    for photometric in (_WHITE, _BLACK, _RGB):
        samples, _, _ = made(photometric, bits)
        assert (
            read(tiff(samples, bits=bits, photometric=photometric, sample_format=sample_format))
            == "unsupported mode"
        )


@pytest.mark.parametrize("compression", ["lzw", "zstd", "jpeg", "webp", "lzma"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_other_compressions(compression, tile, planar):
    file = io.BytesIO()
    samples = RGB if planar == "contig" else np.ascontiguousarray(RGB.transpose(2, 0, 1))
    if compression == "webp" and planar == "separate":
        pytest.skip("WebP has no single planes")
    tifffile.imwrite(
        file,
        samples,
        photometric="rgb",
        planarconfig=planar,
        tile=tile,
        compression=compression,
        metadata=None,
    )
    image = read(file.getvalue())
    assert isinstance(image, np.ndarray)
    assert np.abs(image.astype(int) - RGB).mean() < (
        12 if compression in ("jpeg", "webp") else 1e-9
    )


@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_in_a_tiff_as_pillow_writes_it(subsampling):
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "TIFF", compression="jpeg", quality=95)
    image = read(file.getvalue())
    np.testing.assert_allclose(image, np.asarray(Image.open(file).convert("RGB")), atol=1)


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax(compression):
    file = io.BytesIO()
    black = Image.fromarray(RGB).convert("1")
    black.save(file, "TIFF", compression=compression)
    np.testing.assert_array_equal(read(file.getvalue()), np.asarray(black.convert("RGB")))


def test_ycbcr_that_is_no_jpeg():
    ycc = np.asarray(Image.fromarray(RGB).convert("YCbCr")).astype(np.int64)
    plain = tiff(ycc, bits=8, photometric=6, extra=((530, 3, (1, 1)),))
    image = read(plain)
    assert isinstance(image, np.ndarray)
    assert np.abs(image.astype(int) - RGB).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [3, 4])
def test_orientation_of_either_kind_of_number(orientation, kind):
    data = tiff(RGB, bits=8, photometric=_RGB, extra=((274, kind, (orientation,)),))
    image = read(data)
    turned = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(image, np.asarray(turned.convert("RGB")))


def test_more_samples_than_colours_are_left_out():
    inks = np.dstack([RGB, RGB[..., :1] // 2, RGB[..., :1]]).astype(np.int64)
    np.testing.assert_array_equal(
        read(tiff(inks, bits=8, photometric=_RGB, extra=((338, 3, (2, 0)),))), RGB
    )


def test_a_thumbnail_before_the_picture_is_not_taken_for_it():
    assert read(tiff(RGB, bits=8, photometric=_RGB, extra=((254, 4, (1,)),))) == "unsupported mode"
