"""Decode files of any format to pixels. Both backends use this, so they accept the same images.

`read_header` reads the first bytes only; `decode` makes pixels. With `--decoder own` a backend
decodes ordinary JPEGs (`Header.native`) by its own decoder. All are libjpeg-turbo and give equal
pixels.

Every image becomes 8-bit RGB, upright, by these rules:

- Grey is replicated, palettes are looked up, 1-bit images become 0 and 255.
- Alpha is dropped, not blended, as `PIL.Image.convert("RGB")` and `cv2.IMREAD_COLOR` do.
- CMYK and YCCK are converted by Pillow, without colour profiles.
- 16 bits keep their high byte.
- Animations and multi-page files give their first frame.
- Floating-point, signed and 32-bit integer pixels are rejected: they have no range to map from.

A `.npy` file holds such an image already: uint8 of shape (height, width, 3), RGB. README.md in this
folder says which damage is detected in each format.
"""

import ctypes
import io
import logging
import warnings

import cv2
import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from raypipe.images import jpeg, png, tiff
from raypipe.images.header import MAX_PIXELS, Header, Reject, rejected
from raypipe.images.orientation import upright

# Pillow's warnings about metadata would fill a cluster's logs. Damage that matters is a Reject.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# Plugin classes instead of Image.open: 10 us less an image, and no second limit of pixels.
_PLUGINS: dict[str, type[ImageFile]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
}
FORMATS = ("jpeg", "png", "webp", "bmp", "tiff", "gif", "avif", "heif", "npy")


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Read format, size and orientation. Takes about 8 us for a JPEG, 30 to 120 us for others.

    Raises:
        Reject: the bytes are no image, or a JPEG without its end, or have more than `max_pixels`.
    """
    if not data:
        raise Reject("empty", "0 bytes")
    format = _sniff(data)
    if format is None:
        raise Reject(
            "not an image", f"starts with {data[:12]!r}; known formats are {', '.join(FORMATS)}"
        )
    try:
        header = _header(data, format)
    except Reject:
        raise
    except Exception as error:  # parsers of hostile bytes raise anything
        if format == "jpeg" and jpeg.EOI not in data:
            raise Reject("truncated", f"cut within the headers, after {len(data)} bytes") from error
        raise rejected(error) from error
    if header.height <= 0 or header.width <= 0:
        raise Reject("corrupt", f"the header says {header.width}x{header.height} pixels")
    if header.height * header.width > max_pixels:
        raise Reject(
            "too many pixels", f"{header.width}x{header.height} is more than {max_pixels} pixels"
        )
    return header


def peek(head: bytes) -> Header | None:
    """The header of a JPEG or PNG by its first bytes; None: `read_header` needs all bytes."""
    format = _sniff(head)
    try:
        if format == "jpeg":
            return jpeg.read(head + jpeg.EOI)
        return png.read(head) if format == "png" else None
    except Exception:  # as above
        return None


def _header(data: bytes, format: str) -> Header:
    if format == "jpeg" and (header := jpeg.read(data)) is not None:
        return header
    reader = {"npy": _npy_header, "png": png.read, "tiff": tiff.read}.get(format)
    return reader(data) if reader is not None else _pillow_header(data, format)


def decode(data: bytes, header: Header, reduce: int = 1, *, strict: bool = True) -> np.ndarray:
    """Decode an image of any format.

    Args:
        reduce: decode a native JPEG at 1/`reduce` (1, 2, 4, 8) of its size, rounded up.
        strict: reject images in which a decoder or a checksum finds damage, as "damaged". Otherwise
            return the pixels that can be decoded.

    Returns:
        HWC RGB uint8, upright, contiguous, writable.

    Raises:
        Reject: it cannot be decoded, or is damaged.
    """
    try:
        if header.native:
            image = jpeg.decode(data, header, reduce, strict=strict)
        else:
            image, reduce = _decode_other(data, header.format, strict=strict), 1
    except Reject:
        raise
    except Exception as error:  # as above: zlib, struct, memory and syntax errors
        raise rejected(error) from error
    return check_size(orient(image, header.orientation), header, reduce)


def _decode_other(data: bytes, format: str, *, strict: bool) -> np.ndarray:
    """Decode what is no native JPEG, without its orientation. Raises anything."""
    if format == "npy":
        return _npy_pixels(data)
    if format == "tiff":
        return tiff.decode(data, strict=strict)
    image = _opened(png.pixels(data, strict=strict) if format == "png" else data, format)
    if (
        strict
        and format == "jpeg"
        and (said := jpeg.damage(data, colours="CMYK" if image.mode == "CMYK" else "RGB"))
    ):
        raise Reject("damaged", f"libjpeg: {said}")
    with c_messages:
        image.load()
    if image.mode in ("I", "F"):
        raise Reject(
            "unsupported mode",
            f"pixels of 32 bits (Pillow's mode {image.mode!r}) have no range to map to 8 bits",
        )
    image.info.pop("transparency", None)  # alpha is dropped; convert would warn about it
    return _pixels(image)


_BAND = 1 << 20
"""Pixels copied from Pillow at once. A copy of a whole image would take 3 to 10 bytes a pixel."""


def _pixels(image: Image.Image) -> np.ndarray:
    """A loaded image as HWC RGB uint8."""
    width, height = image.size
    out = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        band = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        if image.mode.startswith("I;16"):
            out[top : top + rows] = (np.asarray(band) >> 8).astype(np.uint8)[..., None]
        else:
            out[top : top + rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return out


def decode_by_pillow(data: bytes, header: Header, reduce: int = 1) -> np.ndarray:
    """Decode a JPEG with Pillow, which does not report most damage. Otherwise as `decode`."""
    try:
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        if reduce > 1:
            image.draft(image.mode, (max(1, image.width // reduce), max(1, image.height // reduce)))
        image.load()
        pixels = _pixels(image)
    except Exception as error:  # as above
        raise rejected(error) from error
    return check_size(orient(pixels, header.orientation), header, reduce)


def check_size(image: np.ndarray, header: Header, reduce: int = 1) -> np.ndarray:
    """Return the image if its size is the header's, by which plans and buffers were made.

    Raises:
        Reject: "corrupt": it has another size.
    """
    size = (-(-header.height // reduce), -(-header.width // reduce))
    if image.shape[:2] != size:
        raise Reject(
            "corrupt", f"decoded to {image.shape[:2]}, but the header says {size} (height, width)"
        )
    return image


def orient(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an HWC image upright by its EXIF orientation.

    The result is contiguous; for orientation 1 it is `image` itself.
    """
    match orientation:
        case 2:
            return cv2.flip(image, 1)
        case 3:
            return cv2.rotate(image, cv2.ROTATE_180)
        case 4:
            return cv2.flip(image, 0)
        case 5:
            return cv2.transpose(image)
        case 6:
            return cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            return cv2.rotate(cv2.transpose(image), cv2.ROTATE_180)
        case 8:
            return cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return image


_THUMBNAIL_PIXELS, _THUMBNAIL_SCANS = 40_000_000, 64
"""Larger images have no thumbnail: it would take the driver more than 0.7 GB, or seconds."""


def thumbnail(data: bytes, *, side: int = 96) -> bytes | None:
    """A JPEG of at most `side` pixels each way, for people to recognise an image.

    None for an image that cannot be decoded, is large, or takes long.
    """
    try:
        header = read_header(data, max_pixels=_THUMBNAIL_PIXELS)
        if header.scans and data.count(b"\xff\xda") > _THUMBNAIL_SCANS:
            return None
        image = decode(
            data,
            header,
            8 if header.native and min(header.height, header.width) >= 8 * side else 1,
            strict=False,
        )
    except Reject:
        return None
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(
        ".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80]
    )[1].tobytes()


class _CMessages:
    """Catches the lines that libjpeg (in OpenCV) and libtiff (in Pillow) print for damaged files.

    They print to C's `stderr`, and have no option against it. Inside `with` this C variable points
    to a temporary file. Messages of Python and C++, in any thread, do not use it. Takes 1.7 us.
    """

    def __init__(self) -> None:
        self._lines = None
        try:
            libc = ctypes.CDLL(None)
            # glibc only: other C libraries have `stderr` read-only, or not at all.
            _ = libc.gnu_get_libc_version
            self._stream = ctypes.c_void_p.in_dll(libc, "stderr")
            libc.tmpfile.restype = ctypes.c_void_p
            self._rewind, self._tell = libc.rewind, libc.ftell
            self._rewind.argtypes = self._tell.argtypes = [ctypes.c_void_p]
            self._tell.restype = ctypes.c_long
            self._real = self._stream.value
            self._lines = libc.tmpfile()
        except (OSError, ValueError, AttributeError, TypeError):  # not glibc: the lines are printed
            pass

    def __enter__(self) -> None:
        if self._lines:
            self._rewind(self._lines)
            self._stream.value = self._lines

    def __exit__(self, *_: object) -> None:
        if self._lines:
            self._stream.value = self._real

    def appeared(self) -> bool:
        """Whether something was printed inside the last `with`."""
        return bool(self._lines) and self._tell(self._lines) > 0


c_messages = _CMessages()


def _sniff(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(png.SIGNATURE):
        return "png"
    if data.startswith(b"\x93NUMPY"):
        return "npy"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data.startswith(b"BM"):
        return "bmp"
    if data[4:8] == b"ftyp":
        brands = {
            data[at : at + 4]
            for at in (8, *range(16, min(int.from_bytes(data[:4], "big"), 256), 4))
        }
        return "avif" if brands & _AVIF else "heif" if brands & _HEIF else None
    return None


_AVIF = {b"avif", b"avis"}
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def _opened(data: bytes, format: str) -> ImageFile:
    if format == "heif":
        # Imported on demand: libheif takes as much memory as all of OpenCV's decoders.
        from pi_heif import HeifImageFile

        return HeifImageFile(io.BytesIO(data))
    return _PLUGINS[format](io.BytesIO(data))


def _pillow_header(data: bytes, format: str) -> Header:
    image = _opened(data, format)
    # After the first scan's header FF is stuffed or a marker, so an EOI there is a real one.
    if format == "jpeg" and data.rfind(jpeg.EOI, image.fp.tell() if image.fp else 0) < 0:
        raise Reject("truncated", f"no end-of-image marker in {len(data)} bytes")
    width, height = image.size
    orientation = upright(image.info.get("exif") or b"", image.info.get("xmp") or b"")
    if orientation >= 5:
        width, height = height, width
    native = format == "jpeg" and image.mode in ("RGB", "L")
    return Header(
        format=format,
        height=height,
        width=width,
        orientation=orientation,
        native=native,
        scans=native,
    )


def _npy_array_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _npy_header(data: bytes) -> Header:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape, _fortran, dtype = _npy_array_header(io.BytesIO(data[:4096]))
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise Reject(
            "unsupported mode",
            f"a .npy image must be uint8 (height, width, 3), this is {dtype} {shape}",
        )
    return Header(format="npy", height=shape[0], width=shape[1])


def _npy_pixels(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO(data)
        shape, fortran, _dtype = _npy_array_header(file)
    start, count = file.tell(), int(np.prod(shape))
    if len(data) - start < count:
        raise Reject("truncated", f"{len(data) - start} bytes of pixels for the shape {shape}")
    flat = np.frombuffer(data, np.uint8, count, start)
    return flat.reshape(shape, order="F" if fortran else "C").copy(order="C")
