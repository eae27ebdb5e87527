"""Metadata never changes pixels, except its orientation, which is applied as Pillow applies it."""

import io
import struct
import zlib

import cv2
import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps

from raypipe.images import opencv, torchvision
from raypipe.images.decode import decode, read_header

RGB = cv2.GaussianBlur(
    np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8), (5, 5), 1
)


def encoded(format: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


PNG, JPEG = encoded("PNG"), encoded("JPEG", quality=95)


def with_chunks(*chunks: bytes, behind: bool = False) -> bytes:
    return (
        PNG[:-12] + b"".join(chunks) + PNG[-12:]
        if behind
        else PNG[:33] + b"".join(chunks) + PNG[33:]
    )


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize(
    "strange",
    [
        chunk(
            b"zTXt", b"workflow\0\0" + zlib.compress(b"node " * 400_000)
        ),  # above Pillow's limit of 1 MB
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"node " * 400_000)),
        chunk(b"zTXt", b"note\0\0no zlib"),
        b"".join(
            chunk(b"tEXt", b"key\0" + b"x" * 1_000_000) for _ in range(70)
        ),  # above Pillow's 64 MB in all
        chunk(b"tEXt", b"Comment\0x", crc=1),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iCCP", b"profile\0\0no zlib"),
        chunk(b"iCCP", b""),
        chunk(b"gAMA", b"", crc=5),
        chunk(b"pHYs", b"1"),
        chunk(b"tIME", b""),
        chunk(b"eXIf", b"no TIFF"),
        chunk(b"sRGB", b""),
        chunk(b"cHRM", b"12"),
        chunk(b"acTL", b""),
        chunk(b"prVt", b"private"),
    ],
)
def test_metadata_of_a_png(strange, behind):
    data = with_chunks(strange, behind=behind)
    np.testing.assert_array_equal(opencv.decode(data, read_header(data)), RGB)
    np.testing.assert_array_equal(
        torchvision.decode(data, read_header(data)).permute(1, 2, 0).numpy(), RGB
    )


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (0xE1, b"Exif\0\0" + bytes(8)),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
        (0xE2, b"ICC_PROFILE\0\1"),
        (0xE2, b"ICC_PROFILE\0\x05\x02" + bytes(4)),
        (0xE2, b"MPF\0" + bytes(3)),
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\xff"),
        (0xEE, b"Adobe"),
        (0xE0, b"JFXX\0\x10"),
        (0xFE, b"\xff\xd9"),
        (0xFE, b""),
    ],
)
def test_metadata_of_a_jpeg(kind, content):
    data = JPEG[:2] + bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content + JPEG[2:]
    np.testing.assert_array_equal(
        opencv.decode(data, read_header(data)), decode(JPEG, read_header(JPEG))
    )


def exif(value: bytes, kind: int, order: str, count: int = 1) -> bytes:
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    far = value if len(value) > 4 else b""
    near = struct.pack(order + "I", 8 + 2 + 24 + 4) if far else value.ljust(4, b"\0")
    maker = struct.pack(order + "HHI4s", 0x010F, 2, 4, b"abc\0")
    entry = struct.pack(order + "HHI", 0x0112, kind, count) + near
    return (
        head + struct.pack(order + "IH", 8, 2) + maker + entry + struct.pack(order + "I", 0) + far
    )


def in_jpeg(*segments: bytes) -> bytes:
    return (
        JPEG[:2]
        + b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments)
        + JPEG[2:]
    )


def xmp(text: str) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{text}</x:xmpmeta>'.encode()


def raw_profile(block: bytes) -> bytes:
    digits = block.hex().encode()
    return (
        b"\nexif\n%8d\n" % len(block)
        + b"\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
        + b"\n"
    )


XMPS = {
    "attribute": xmp('<rdf:Description tiff:Orientation="6"/>'),
    "element": xmp("<tiff:Orientation>8</tiff:Orientation>"),
    "zero": xmp('<rdf:Description tiff:Orientation="0"/>'),
    "none": xmp(""),
}
ADOBE = b"http://ns.adobe.com/xap/1.0/\0"
SIX = b"Exif\0\0" + exif(struct.pack("<H", 6), 3, "<")
NUMBERS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I"}

TURNED = (
    {
        f"jpeg, exif kind {kind} {order} {value}": in_jpeg(
            b"Exif\0\0" + exif(struct.pack(order + form, value), kind, order)
        )
        for kind, form in NUMBERS.items()
        for order in "<>"
        for value in (1, 3, 6, 8)
    }
    | {
        "jpeg, a fraction": in_jpeg(b"Exif\0\0" + exif(struct.pack("<II", 12, 2), 5, "<")),
        "jpeg, two numbers": in_jpeg(b"Exif\0\0" + exif(struct.pack("<HH", 6, 6), 3, "<", count=2)),
        "jpeg, 9": in_jpeg(b"Exif\0\0" + exif(struct.pack("<H", 9), 3, "<")),
        "jpeg, 0 and XMP": in_jpeg(
            b"Exif\0\0" + exif(struct.pack("<H", 0), 3, "<"), ADOBE + XMPS["attribute"]
        ),
        "jpeg, EXIF twice": in_jpeg(b"Exif\0\0" + SIX),
        "jpeg, EXIF in two segments": in_jpeg(SIX[:25], b"Exif\0\0" + SIX[25:]),
        "jpeg, XMP before EXIF": in_jpeg(ADOBE + XMPS["element"], SIX),
        "png eXIf": with_chunks(chunk(b"eXIf", SIX[6:])),
        "png eXIf behind": with_chunks(chunk(b"eXIf", SIX[6:]), behind=True),
        "png raw profile": with_chunks(
            chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile(SIX)))
        ),
        "png raw profile, plain": with_chunks(
            chunk(b"tEXt", b"Raw profile type exif\0" + raw_profile(SIX))
        ),
        "png raw profile behind": with_chunks(
            chunk(b"tEXt", b"Raw profile type exif\0" + raw_profile(SIX)), behind=True
        ),
        "png XMP": with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMPS["attribute"])),
        "png XMP packed": with_chunks(
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMPS["element"]))
        ),
        "webp exif": encoded("WEBP", lossless=True, exif=SIX),
        "webp exif long": encoded("WEBP", lossless=True, exif=exif(struct.pack(">I", 5), 4, ">")),
        "webp xmp": encoded("WEBP", lossless=True, xmp=XMPS["attribute"]),
        "avif exif": encoded("AVIF", exif=SIX),
        "gif": encoded("GIF"),
    }
    | {f"jpeg, XMP {name}": in_jpeg(ADOBE + packet) for name, packet in XMPS.items()}
)


@pytest.mark.parametrize("name", TURNED)
def test_what_pillow_turns_is_turned(name):
    data = TURNED[name]
    image = decode(data, read_header(data))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(image, np.asarray(expected))


def test_half_of_these_are_really_turned():
    headers = [read_header(data) for data in TURNED.values()]
    assert sum(header.height == 40 for header in headers) > len(headers) / 2


# ----------------------------------------------------------------------------------- AVIF and HEIC


def heic(**options) -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(RGB)).save(file, quality=100, chroma=444, **options)
    return file.getvalue()


def test_avif():
    data = encoded("AVIF", quality=100, subsampling="4:4:4")
    header = read_header(data)
    assert (header.format, header.height, header.width) == ("avif", 30, 40)
    np.testing.assert_array_equal(
        decode(data, header), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )
    assert np.abs(decode(data, header).astype(int) - RGB).mean() < 3


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic(orientation):
    block = b"Exif\0\0" + exif(struct.pack("<H", orientation), 3, "<")
    data = heic(exif=block)
    header = read_header(data)
    assert header.format == "heif"
    upright = RGB if orientation == 1 else np.rot90(RGB, -1)
    image = decode(data, header)
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 4
    np.testing.assert_array_equal(torchvision.decode(data, header).permute(1, 2, 0).numpy(), image)


@pytest.mark.parametrize("data", [heic(), encoded("AVIF")], ids=["heic", "avif"])
def test_cut_heic_and_avif_are_rejected(data):
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
        part = data[: int(len(data) * share)]
        with pytest.raises(Exception, match=r"corrupt|truncated|not an image|unsupported"):
            decode(part, read_header(part))
