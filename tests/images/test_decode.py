import io
import pickle
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from raypipe.images import opencv, torchvision
from raypipe.images.decode import decode as decode_any
from raypipe.images.decode import orient, read_header
from raypipe.images.header import REASONS, Header, Reject
from raypipe.images.orientation import upright

RGB = cv2.GaussianBlur(
    np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8), (5, 5), 1
)
PICTURE = Image.fromarray(RGB)
RGB16 = (
    RGB.astype(np.uint16) << 8
) | 200  # low bytes that would round up: 16 bits must keep the high byte


def pillow(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def opencv_file(extension: str, rgb: np.ndarray) -> bytes:
    bgr = rgb[..., [2, 1, 0, *range(3, rgb.shape[2])]]
    return cv2.imencode(extension, np.ascontiguousarray(bgr))[1].tobytes()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """The image. Checks that both backends give the same, of the header's size, and writable."""
    header = read_header(data)
    image = opencv.decode(data, header)
    assert image.shape == (header.height, header.width, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous and image.flags.writeable
    np.testing.assert_array_equal(torchvision.decode(data, header).permute(1, 2, 0).numpy(), image)
    return image


GREY = np.asarray(PICTURE.convert("L"))[..., None].repeat(3, axis=2)
ALPHA = np.dstack([RGB, np.arange(RGB.size // 3, dtype=np.uint8).reshape(RGB.shape[:2])])
LOSSLESS = {
    "png": (pillow(PICTURE, "PNG"), RGB),
    "png interlaced by opencv": (opencv_file(".png", RGB), RGB),
    "png alpha is dropped, not blended": (pillow(Image.fromarray(ALPHA), "PNG"), RGB),
    "png grey": (pillow(PICTURE.convert("L"), "PNG"), GREY),
    "png grey alpha": (pillow(PICTURE.convert("LA"), "PNG"), GREY),
    "png palette": (
        pillow(PICTURE.convert("P"), "PNG"),
        np.asarray(PICTURE.convert("P").convert("RGB")),
    ),
    "png palette with transparency": (
        pillow(PICTURE.convert("P"), "PNG", transparency=bytes(range(256))),
        np.asarray(PICTURE.convert("P").convert("RGB")),
    ),
    "png 1 bit": (
        pillow(PICTURE.convert("1"), "PNG"),
        np.asarray(PICTURE.convert("1").convert("RGB")),
    ),
    "png 16 bit": (opencv_file(".png", RGB16), RGB),
    "png 16 bit alpha": (opencv_file(".png", np.dstack([RGB16, RGB16[..., :1]])), RGB),
    "png 16 bit grey": (
        pillow(Image.fromarray(RGB16[..., 0]), "PNG"),
        RGB[..., :1].repeat(3, axis=2),
    ),
    "webp": (pillow(PICTURE, "WEBP", lossless=True), RGB),
    "bmp": (pillow(PICTURE, "BMP"), RGB),
    "gif": (pillow(PICTURE.convert("P"), "GIF"), np.asarray(PICTURE.convert("P").convert("RGB"))),
    "gif animated: the first frame": (
        pillow(PICTURE.convert("P"), "GIF", save_all=True, append_images=[PICTURE.convert("L")]),
        np.asarray(PICTURE.convert("P").convert("RGB")),
    ),
    "tiff": (pillow(PICTURE, "TIFF"), RGB),
    "tiff lzw": (pillow(PICTURE, "TIFF", compression="tiff_lzw"), RGB),
    "tiff pages: the first": (
        pillow(PICTURE, "TIFF", save_all=True, append_images=[PICTURE.convert("L")]),
        RGB,
    ),
    "tiff 16 bit": (opencv_file(".tiff", RGB16), RGB),
    "tiff 16 bit grey": (
        pillow(Image.fromarray(RGB16[..., 0]), "TIFF"),
        RGB[..., :1].repeat(3, axis=2),
    ),
    "npy": (npy(RGB), RGB),
    "npy fortran order": (npy(np.asfortranarray(RGB)), RGB),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_format_becomes_the_same_8_bit_rgb_in_both_backends(name):
    data, expected = LOSSLESS[name]
    np.testing.assert_array_equal(decoded(data), expected)


JPEGS = {
    "colour": pillow(PICTURE, "JPEG", quality=95),
    "no chroma subsampling": pillow(PICTURE, "JPEG", subsampling=0),
    "grey": pillow(PICTURE.convert("L"), "JPEG"),
    "progressive": pillow(PICTURE, "JPEG", progressive=True),
    "rgb inside": pillow(PICTURE, "JPEG", keep_rgb=True),
}


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_are_decoded_natively_and_equally_at_any_scale(name, reduce, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = pillow(Image.open(io.BytesIO(JPEGS[name])), "JPEG", quality="keep", exif=exif)
    header = read_header(data)
    assert header.native
    assert (header.height, header.width) == ((37, 53) if orientation == 1 else (53, 37))
    image = opencv.decode(data, header, reduce)
    assert image.shape == (-(-header.height // reduce), -(-header.width // reduce), 3)
    np.testing.assert_array_equal(
        torchvision.decode(data, header, reduce).permute(1, 2, 0).numpy(), image
    )
    for backend in (opencv, torchvision):  # with their own decoders too
        own = backend.decode(data, header, reduce, decoder="own")
        np.testing.assert_array_equal(
            own if backend is opencv else own.permute(1, 2, 0).numpy(), image
        )


def test_cmyk_jpeg_goes_through_pillow():
    data = pillow(PICTURE.convert("CMYK"), "JPEG", quality=95)
    assert not read_header(data).native
    assert np.abs(decoded(data).astype(int) - RGB).mean() < 4


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    exif = Image.Exif()
    exif[0x010F] = "a maker, so that the orientation is not the first entry"
    exif[0x0112] = orientation
    data = pillow(PICTURE, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    plain = Image.open(io.BytesIO(data))
    expected = np.asarray(ImageOps.exif_transpose(plain).convert("RGB"))
    np.testing.assert_array_equal(decoded(data), expected)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_parser(orientation, order):
    block = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(
        order + "IHHHIHH", 8, 1, 0x0112, 3, 1, orientation, 0
    )
    expected = orientation if 1 <= orientation <= 8 else 1
    assert upright(b"Exif\0\0" + block) == expected
    for length in range(len(block)):
        assert upright(block[:length]) in (1, expected)


def test_orient_undoes_itself():
    for orientation, inverse in {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.items():
        np.testing.assert_array_equal(orient(orient(RGB, orientation), inverse), RGB)


# ------------------------------------------------------------------------------------------ rejects


def reason(data: bytes, decoder: str = "simplejpeg", **options) -> str:
    """The reason of a reject. Both backends must agree, and nothing else may be raised."""
    try:
        header = read_header(data, **options)
    except Reject as reject:
        return reject.reason
    reasons = []
    for backend in (opencv, torchvision):
        try:
            image = backend.decode(data, header, decoder=decoder)
            reasons.append(
                (
                    "",
                    np.asarray(image).tobytes()
                    if backend is opencv
                    else image.permute(1, 2, 0).numpy().tobytes(),
                )
            )
        except Reject as reject:
            reasons.append((reject.reason, None))
    assert reasons[0] == reasons[1]
    assert reasons[0][0] in ("", *REASONS)
    return reasons[0][0]


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"\0" * 100, "not an image"),
        (b"<html>404 not found</html>", "not an image"),
        (b"\xff\xd8\xff", "truncated"),
        (JPEGS["colour"][:300], "truncated"),
        (JPEGS["colour"][:-2], "truncated"),
        (JPEGS["progressive"][: len(JPEGS["progressive"]) // 2], "truncated"),
        (LOSSLESS["png"][0][:-100], "truncated"),
        (LOSSLESS["webp"][0][:-100], "corrupt"),
        (npy(RGB)[:-1], "truncated"),
        (npy(RGB.astype(np.float32)), "unsupported mode"),
        (npy(RGB[..., 0]), "unsupported mode"),
        (npy(np.array([{"an": "object"}])), "unsupported mode"),
        (pillow(PICTURE.convert("F"), "TIFF"), "unsupported mode"),
        (pillow(PICTURE.convert("I"), "TIFF"), "unsupported mode"),
        (png_of_size(100_000, 100_000), "too many pixels"),
        (png_of_size(100, 100), "truncated"),
    ],
)
def test_reasons(data, expected):
    assert reason(data) == expected


def test_pixel_limit_is_checked_from_the_header():
    data = LOSSLESS["png"][0]
    read_header(data, max_pixels=37 * 53)
    with pytest.raises(Reject, match="too many pixels: 53x37 is more than 1960"):
        read_header(data, max_pixels=37 * 53 - 1)


def test_a_thumbnails_end_marker_does_not_hide_a_missing_one():
    exif = Image.Exif()
    exif[0x927C] = b"thumbnail " + JPEGS["colour"]
    data = pillow(PICTURE, "JPEG", exif=exif)
    assert data.count(b"\xff\xd9") >= 2
    assert reason(data) == ""
    assert reason(data[:-2]) == "truncated"


def test_trailing_bytes_are_no_damage():
    for name in JPEGS:
        assert reason(JPEGS[name] + b"\0" * 3) == ""


def test_reject_survives_pickling():
    reject = pickle.loads(pickle.dumps(Reject("truncated", "no end")))
    assert (reject.reason, reject.detail, str(reject)) == (
        "truncated",
        "no end",
        "truncated: no end",
    )


def test_a_decoder_that_disagrees_with_the_header_is_caught():
    with pytest.raises(Reject, match=r"corrupt: decoded to \(37, 53\)"):
        decode_any(LOSSLESS["png"][0], Header(format="png", height=40, width=53))


FUZZED = {"jpeg": JPEGS["colour"], "progressive": JPEGS["progressive"]} | {
    name: LOSSLESS[name][0]
    for name in (
        "png",
        "png palette",
        "webp",
        "bmp",
        "gif",
        "tiff",
        "tiff lzw",
        "tiff 16 bit",
        "npy",
    )
}


@pytest.fixture
def quiet(capfd):
    """Fail the test if anything is printed, by C code too, or warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", module=r"PIL\."
        )  # as raypipe.images.decode sets it; pytest resets it
        yield
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FUZZED)
def test_cut_anywhere_it_is_rejected_or_whole(name, quiet):
    data = FUZZED[name]
    for length in range(0, len(data), max(1, len(data) // 150)):
        why = reason(data[:length])
        # Some formats end with pixels or with unimportant bytes: complete before their last byte.
        assert why or (
            length > len(data) * 0.8 and name not in ("jpeg", "progressive", "bmp", "npy")
        ), length


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_anywhere_nothing_but_reject_is_raised(name, quiet):
    data, rng = FUZZED[name], np.random.default_rng(7)
    for trial in range(150):
        broken = bytearray(data)
        area = len(data) if trial % 2 else min(len(data), 200)  # headers are short but matter most
        for _ in range(rng.integers(1, 8)):
            broken[rng.integers(area)] = rng.integers(256)
        reason(bytes(broken), max_pixels=10_000_000)


@pytest.mark.parametrize("name", FUZZED)
def test_garbage_after_any_magic_number_is_rejected(name, quiet):
    rng = np.random.default_rng(8)
    for _ in range(20):
        assert reason(FUZZED[name][:16] + rng.bytes(300), max_pixels=10_000_000)


def test_with_own_decoders_what_libjpeg_complains_about_is_decided_as_pillow_does(quiet):
    """OpenCV alone returns an image for some files that Pillow rejects."""
    whole = pillow(Image.fromarray(cv2.resize(RGB, (320, 240))), "JPEG", quality=95)
    rng, verdicts = np.random.default_rng(0), []
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(3):
            broken[rng.integers(600, len(whole) - 2)] = rng.integers(256)
        verdicts.append(reason(bytes(broken), decoder="own"))
    assert verdicts.count("corrupt") > 5
    assert verdicts.count("") > 100
