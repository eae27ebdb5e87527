"""From bytes to pixels: what both backends share, so that they agree on which images are accepted and how these look.

`read_header` looks at the first bytes only and says what a file is; `decode_shared` decodes everything that is not an ordinary
JPEG. An ordinary JPEG (`Header.native`) is decoded by each backend with its own decoder; both are libjpeg-turbo and give equal
pixels.

Every image becomes 8-bit RGB, upright (EXIF orientation applied), by these rules:

- grey is replicated; palettes are looked up; 1-bit images become 0 and 255;
- alpha is dropped, not blended, as `PIL.Image.convert("RGB")` and `cv2.IMREAD_COLOR` do;
- CMYK and YCCK go through Pillow's convert, without colour profiles;
- 16 bits keep their high byte;
- of animations and multi-page files the first frame;
- floating-point and 32-bit integer pixels are rejected: they have no range to map from.

A `.npy` file holds such an image already: uint8 of shape (height, width, 3), RGB.
"""

import ctypes
import io
import logging
import struct
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

# What Pillow says about odd metadata would only fill a cluster's logs: damage that matters becomes a Reject with a reason.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

MAX_PIXELS = 178_956_970
"""Images with more pixels are rejected from their header: 512 MiB as RGB. The same figure at which Pillow refuses by default."""

UNREAD = "unread"
"""The reason of a row whose bytes its store did not give in time. It is no reject: the next run tries again."""

REASONS = (
    UNREAD,
    "empty",
    "not an image",
    "truncated",
    "corrupt",
    "too many pixels",
    "too small",
    "unsupported mode",
    "unreadable",
    "bad boxes",
    "kills its process",
    "failed",  # an op raised something else
)
"""All reasons for which an image is left out, few enough to count by."""


class Reject(Exception):
    """This one image cannot be processed; the run goes on.

    `reason` is one of REASONS, for counting; `detail` says for a person what exactly is wrong.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)  # these as args: that is what pickle restores an exception from
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the first bytes of a file say.

    `height` and `width` are those of the upright image. `orientation` is the EXIF number (1..8) that decoding still has to
    apply: 1 for TIFF, where Pillow does so itself. `native`: an 8-bit grey or colour JPEG, which a backend decodes with its
    own decoder.
    """

    format: str
    height: int
    width: int
    orientation: int = 1
    native: bool = False


# The plugin classes rather than Image.open: 10 us less an image, and no second pixel limit beside ours.
_PLUGINS: dict[str, type[ImageFile]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "gif": GifImagePlugin.GifImageFile,
}
_EXIF_ORIENTATION = 0x0112
_EOI = b"\xff\xd9"


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Reads format, size and orientation. Takes about 8 us for a JPEG, 30 for others, and decodes nothing.

    Raises Reject if the bytes are no image, have more than `max_pixels`, or are a JPEG without its end (which OpenCV would
    silently fill up with grey).
    """
    if not data:
        raise Reject("empty", "0 bytes")
    format = _sniff(data)
    if format is None:
        known = ", ".join([*_PLUGINS, "npy"])
        raise Reject("not an image", f"starts with {data[:12]!r}; known formats are {known}")
    try:
        header = _npy_header(data) if format == "npy" else (format == "jpeg" and _jpeg_header(data)) or _pillow_header(data, format)
    except Reject:
        raise
    except Exception as error:  # parsers of hostile bytes raise anything; whatever it is, this image has no header
        if format == "jpeg" and _EOI not in data:
            raise Reject("truncated", f"cut within the headers, after {len(data)} bytes") from error
        raise rejected(error) from error
    if header.height <= 0 or header.width <= 0:
        raise Reject("corrupt", f"the header says {header.width}x{header.height} pixels")
    if header.height * header.width > max_pixels:
        raise Reject("too many pixels", f"{header.width}x{header.height} is more than {max_pixels} pixels")
    return header


def decode_shared(data: bytes, header: Header) -> np.ndarray:
    """Decodes what is not native. Returns HWC RGB uint8, upright, contiguous. Raises Reject."""
    try:
        image = _npy_pixels(data) if header.format == "npy" else _pillow_pixels(data, header.format)
    except Reject:
        raise
    except Exception as error:  # as above: zlib, struct, memory and syntax errors, all of them this image's
        raise rejected(error) from error
    return check_size(orient(image, header.orientation), header)


def decode_jpeg(data: bytes, header: Header, reduce: int = 1) -> np.ndarray:
    """Decodes a JPEG with Pillow, at 1/`reduce` (1, 2, 4, 8) of its size, rounded up. Returns and raises as decode_shared.

    Strict: what libjpeg takes for an error anywhere in the file is one, also behind the last pixel.
    """
    try:
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        if reduce > 1:
            image.draft(image.mode, (max(1, image.width // reduce), max(1, image.height // reduce)))
        image.load()
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # as above
        raise rejected(error) from error
    return check_size(orient(pixels, header.orientation), header, reduce)


def check_size(image: np.ndarray, header: Header, reduce: int = 1) -> np.ndarray:
    """Returns the image if it has the size that its header promised (plans and buffers were made by it), else raises Reject."""
    size = (-(-header.height // reduce), -(-header.width // reduce))
    if image.shape[:2] != size:
        raise Reject("corrupt", f"decoded to {image.shape[:2]}, but the header says {size} (height, width)")
    return image


def orient(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turns an HWC image upright by its EXIF orientation. The result is contiguous; 1 returns the image itself."""
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


def thumbnail(data: bytes, *, side: int = 96) -> bytes | None:
    """A JPEG of at most `side` pixels each way, for a person to recognise an image by; None if it cannot be decoded."""
    try:
        header = read_header(data)
        image = decode_shared(data, header)
    except Reject:
        return None
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


class _CMessages:
    """Catches the lines that libjpeg (in OpenCV) and libtiff (in Pillow) print for damaged files, and tells if there were some.

    These print through C's `stderr`, and there is no other way to stop that. So within `with` this C variable points to a
    temporary file. Python's and C++'s messages, also of other threads, do not go through it. Takes 1.7 us.
    """

    def __init__(self) -> None:
        self._lines = None
        try:
            libc = ctypes.CDLL(None)
            _ = libc.gnu_get_libc_version  # other C libraries have this variable in read-only memory, or not at all
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
        """Whether something was printed within the last `with`."""
        return bool(self._lines) and self._tell(self._lines) > 0


c_messages = _CMessages()


def _sniff(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
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
    return None


def rejected(error: Exception) -> Reject:
    """Sorts what a decoder raised into a reason."""
    text = f"{type(error).__name__}: {error}"
    low = text.lower()
    if isinstance(error, MemoryError):
        return Reject("too many pixels", f"not enough memory to decode it ({text})")
    if "truncated" in low or "eof" in low:
        return Reject("truncated", text)
    if isinstance(error, NotImplementedError) or "cannot handle" in low or "unsupported" in low or "pixel mode" in low:
        return Reject("unsupported mode", text)
    return Reject("corrupt", text)


_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">BHHB")


def _jpeg_header(data: bytes) -> Header | None:
    """The header of a JPEG as cameras and encoders write them, None for any other: that is Pillow's to judge.

    7 us against Pillow's 30: one percent of an image of 640x480, which is why this is not left to the library.
    """
    at, size, orientation = 2, None, 1
    try:
        while True:
            mark, kind, length = _SEGMENT.unpack_from(data, at)
            if mark != 0xFF or length < 2:
                return None
            if kind == 0xDA:  # start of scan: behind it FF only comes stuffed or as a marker, so an EOI found there is a real one
                break
            if kind in (0xC0, 0xC1, 0xC2):
                if size is not None:
                    return None
                precision, height, width, components = _FRAME.unpack_from(data, at + 4)
                if precision != 8 or components not in (1, 3):
                    return None
                size = height, width
            elif kind == 0xE1 and orientation == 1 and data.startswith(b"Exif\0\0", at + 4):
                orientation = exif_orientation(data[at + 4 : at + 2 + length])
            elif not (kind in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= kind <= 0xEF):
                return None
            at += 2 + length
    except struct.error:
        return None
    if size is None or data.rfind(_EOI, at) < 0:
        return None
    height, width = size if orientation < 5 else size[::-1]
    return Header(format="jpeg", height=height, width=width, orientation=orientation, native=True)


def _pillow_header(data: bytes, format: str) -> Header:
    file = io.BytesIO(data)
    image = _PLUGINS[format](file)
    # Behind the first scan's header FF only comes stuffed or as a marker: an EOI found there is a real one. From the end: there it is.
    if format == "jpeg" and data.rfind(_EOI, file.tell()) < 0:
        raise Reject("truncated", f"no end-of-image marker in {len(data)} bytes")
    width, height = image.size
    exif = image.info.get("exif")
    orientation = exif_orientation(exif) if exif and format != "tiff" else 1
    if orientation >= 5:
        width, height = height, width
    native = format == "jpeg" and image.mode in ("RGB", "L")
    return Header(format=format, height=height, width=width, orientation=orientation, native=native)


def exif_orientation(exif: bytes) -> int:
    """The orientation (1..8) of an EXIF block, 1 if it has none or is damaged. 2 us; Pillow's whole parse takes 50."""
    tiff = exif[6:] if exif.startswith(b"Exif\0\0") else exif
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, _count, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == _EXIF_ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _pillow_pixels(data: bytes, format: str) -> np.ndarray:
    image = _PLUGINS[format](io.BytesIO(data))
    with c_messages:
        image.load()
    if image.mode.startswith("I;16"):
        high = (np.asarray(image) >> 8).astype(np.uint8)
        return cv2.cvtColor(high, cv2.COLOR_GRAY2RGB)
    if image.mode in ("I", "F"):
        raise Reject("unsupported mode", f"pixels of 32 bits (Pillow's mode {image.mode!r}) have no range to map to 8 bits")
    image.info.pop("transparency", None)  # dropped in any case; convert would warn about it
    return np.array(image.convert("RGB"))


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
        raise Reject("unsupported mode", f"a .npy image must be uint8 (height, width, 3), this is {dtype} {shape}")
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
