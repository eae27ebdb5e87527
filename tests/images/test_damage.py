"""Damaged files are detected.

For the figures of a larger trial: python tests/images/test_damage.py 1000
"""

import io
import sys
from collections import Counter

import cv2
import numpy as np
import pytest
from PIL import Image

from raypipe.images.decode import decode, read_header
from raypipe.images.header import Reject

KINDS = ("third", "zeros", "foreign", "noise", "cut")


def photos(count: int) -> list[np.ndarray]:
    rng, made = np.random.default_rng(3), []
    for _ in range(count):
        height, width = int(rng.integers(240, 700)), int(rng.integers(240, 900))
        octaves = [
            rng.normal(0, 90 / 2**k, (4 * 2**k, 5 * 2**k, 3)).astype(np.float32) for k in range(7)
        ]
        texture = sum(
            cv2.resize(octave, (width, height), interpolation=cv2.INTER_CUBIC) for octave in octaves
        )
        made.append(np.clip(128 + texture * 0.6, 0, 255).astype(np.uint8))
    return made


def encoded(image: np.ndarray, format: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, **options)
    return file.getvalue()


PHOTOS = photos(3)
JPEGS = [
    encoded(
        image if options.pop("colour", True) else image[..., 1],
        "JPEG",
        **{"quality": 90, **options},
    )
    for image in PHOTOS
    for options in (
        {},
        {"subsampling": 0},
        {"progressive": True},
        {"quality": 50},
        {"restart_marker_rows": 2},
        {"colour": False},
    )
]
OTHERS = {
    "png": [encoded(image, "PNG") for image in PHOTOS],
    "png16": [cv2.imencode(".png", image.astype(np.uint16) << 8)[1].tobytes() for image in PHOTOS],
    "tiff lzw": [encoded(image, "TIFF", compression="tiff_lzw") for image in PHOTOS],
    "tiff deflate": [encoded(image, "TIFF", compression="tiff_adobe_deflate") for image in PHOTOS],
    "tiff jpeg": [encoded(image, "TIFF", compression="jpeg") for image in PHOTOS],
    "gif": [encoded(image[..., 1], "GIF") for image in PHOTOS],
    "webp": [encoded(image, "WEBP", quality=90) for image in PHOTOS],
    "webp lossless": [encoded(image, "WEBP", lossless=True) for image in PHOTOS],
    "avif": [encoded(image, "AVIF", quality=80) for image in PHOTOS],
    "tiff": [encoded(image, "TIFF") for image in PHOTOS],
    "bmp": [encoded(image, "BMP") for image in PHOTOS],
}
WITHOUT_A_TRACE = ("webp", "webp lossless", "avif", "tiff", "bmp")
"""Formats without checksums, whose decoders decode any bytes (raypipe/images/README.md)."""


def damaged(data: bytes, kind: str, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Damage `data` in one of five ways.

    It loses its middle third; gets up to 4 kB of zeros, of another image or of noise; or is cut and
    closed by an end mark.
    """
    if kind == "third":
        return data[: len(data) // 3] + data[2 * len(data) // 3 :]
    start = data.index(b"\xff\xda") + 14 if data[:2] == b"\xff\xd8" else min(200, len(data) // 10)
    size = min(4096, (len(data) - start) // 3)
    at = int(rng.integers(start, len(data) - size - 16))
    if kind == "cut":
        return data[:at] + b"\xff\xd9"
    other = others[int(rng.integers(len(others)))]
    new = {
        "zeros": bytes(size),
        "foreign": other[1000 : 1000 + size].ljust(size, b"\1"),
        "noise": rng.bytes(size),
    }[kind]
    return data[:at] + new + data[at + size :]


def outcome(data: bytes) -> str:
    try:
        decode(data, read_header(data))
    except Reject as reject:
        return reject.reason
    return "delivered"


def trial(
    files: list[bytes], count: int, *, seed: int, kinds: tuple[str, ...]
) -> Counter[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    seen: Counter[tuple[str, str]] = Counter()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        seen[kind, outcome(damaged(files[int(rng.integers(len(files)))], kind, files, rng))] += 1
    return seen


def test_damaged_jpegs_are_rejected():
    """libjpeg warns of most damage. 1 in 1,000 ends by chance where the image ends: no warning."""
    seen = trial(JPEGS, 300, seed=1, kinds=KINDS)
    assert sum(count for (_, how), count in seen.items() if how == "delivered") <= 2, seen
    assert sum(count for (_, how), count in seen.items() if how == "damaged") >= 290, seen


def test_whole_jpegs_are_not():
    assert {outcome(data) for data in JPEGS} == {"delivered"}


@pytest.mark.parametrize("format", OTHERS)
def test_damage_in_other_formats(format):
    seen = trial(OTHERS[format], 45, seed=2, kinds=KINDS[:3])
    delivered = sum(count for (_, how), count in seen.items() if how == "delivered")
    assert (delivered > 0) == (format in WITHOUT_A_TRACE), seen
    assert {outcome(data) for data in OTHERS[format]} == {"delivered"}


def rejected(data: bytes) -> Reject:
    with pytest.raises(Reject) as caught:
        decode(data, read_header(data))
    return caught.value


def test_libjpegs_words_are_the_detail():
    reject = rejected(JPEGS[0][:20_000] + b"\xff\xd9")
    assert reject.reason == "damaged"
    assert reject.detail == "libjpeg: Corrupt JPEG data: premature end of data segment"


@pytest.mark.parametrize("padding", [b"\0", b"\xff", b"\xff\0"])
@pytest.mark.parametrize("count", [1, 2, 5, 9, 100, 4096])
def test_padding_before_the_end_mark_is_no_damage(padding, count):
    for data in JPEGS:
        padded = data[:-2] + padding * count + data[-2:]
        np.testing.assert_array_equal(
            decode(padded, read_header(padded)), decode(data, read_header(data))
        )


def test_other_bytes_before_the_end_mark_are():
    assert all(rejected(data[:-2] + b" " * 100 + data[-2:]).reason == "damaged" for data in JPEGS)


@pytest.mark.parametrize("count", [64, 200, 3000])
def test_zeros_in_place_of_the_last_pixels_are_no_padding(count):
    """Zeros decode to pixels, and the rest of them looks like padding."""
    assert {rejected(data[: -2 - count] + bytes(count) + data[-2:]).reason for data in JPEGS} == {
        "damaged"
    }


def test_a_progressive_jpeg_cut_between_scans():
    """libjpeg does not report it: the image is blurred."""
    data, starts = JPEGS[2], []
    while (at := data.find(b"\xff\xda", starts[-1] + 2 if starts else 0)) >= 0:
        starts.append(at)
    assert len(starts) > 5
    for start in starts[1:]:
        reject = rejected(data[: data.rfind(b"\xff\xc4", 0, start)] + b"\xff\xd9")
        assert reject.reason == "damaged" and "scans are missing" in reject.detail


_ICC = b"\xff\xe2" + (2 + 14 + 20).to_bytes(2, "big") + b"ICC_PROFILE\0\x05\x02" + bytes(20)
_ADOBE = b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\x07"


@pytest.mark.parametrize(
    "extra", [_ICC, _ADOBE, _ICC + _ADOBE], ids=["profile", "transform", "both"]
)
@pytest.mark.parametrize("version", [b"\1\1", b"\3\1"], ids=["JFIF 1", "JFIF 3"])
def test_metadata_that_libjpeg_does_not_know_is_no_damage(extra, version):
    data = JPEGS[0]
    at = data.index(b"JFIF\0") + 5
    strange = data[:2] + extra + data[2:at] + version + data[at + 2 : -2] + bytes(50) + data[-2:]
    np.testing.assert_array_equal(
        decode(strange, read_header(strange)), decode(data, read_header(data))
    )
    assert rejected(strange[:20_000] + b"\xff\xd9").reason == "damaged"


def test_a_cmyk_jpeg():
    file = io.BytesIO()
    Image.fromarray(PHOTOS[0]).convert("CMYK").save(file, "JPEG", quality=90)
    data = file.getvalue()
    assert outcome(data) == "delivered"
    seen = trial([data], 40, seed=4, kinds=KINDS)
    assert sum(count for (_, how), count in seen.items() if how == "delivered") <= 1, seen


def test_what_is_kept_is_what_libjpeg_makes_of_it():
    data = JPEGS[0][:20_000] + b"\xff\xd9"
    image = decode(data, read_header(data), strict=False)
    np.testing.assert_array_equal(
        image, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    )


def test_a_png_with_a_wrong_checksum_is_kept_too():
    data = bytearray(OTHERS["png"][0])
    at = data.index(b"IDAT")
    data[at + 4 + int.from_bytes(data[at - 4 : at], "big")] ^= 1
    reject = rejected(bytes(data))
    assert reject.reason == "damaged" and "checksum of its chunk IDAT" in reject.detail
    whole = OTHERS["png"][0]
    np.testing.assert_array_equal(
        decode(bytes(data), read_header(whole), strict=False), decode(whole, read_header(whole))
    )


if __name__ == "__main__":
    number = int(sys.argv[1])
    print("jpeg", dict(trial(JPEGS, number, seed=0, kinds=KINDS)))
    for name, some in OTHERS.items():
        print(name, dict(trial(some, number // 10, seed=0, kinds=KINDS[:3])))
