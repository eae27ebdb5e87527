"""An image's header, and the reasons for which an image is rejected."""

from dataclasses import dataclass

MAX_PIXELS = 178_956_970
"""Images with more pixels are rejected by their header: 512 MiB as RGB. Pillow's limit too."""

UNREAD = "unread"
"""The store did not deliver the bytes in time. Not a reject: the next run tries the row again."""

NO_ROOM = "no room in --actor-memory beside the rest of its shard"
"""The detail of an UNREAD row that fits alone. It is done again, in a smaller shard."""

REASONS = (
    UNREAD,
    "empty",
    "not an image",
    "truncated",
    "damaged",  # can be decoded, to other pixels than were encoded: --damaged keep delivers it
    "corrupt",
    "too many pixels",
    "too large for --actor-memory",
    "takes too long",
    "too small",
    "unsupported mode",
    "unreadable",
    "bad boxes",
    "kills its process",
    "failed",  # an op raised something else
)
"""All reasons for which an image is left out: few, because reports count by them."""


class Reject(Exception):
    """An image cannot be processed; the run goes on without it.

    reason: one of REASONS, to count by.
    detail: what exactly is wrong, for people.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)  # pickle restores an exception from these args
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the first bytes of a file say about the image.

    height, width: of the upright image.
    orientation: the EXIF number, 1 to 8, that decoding has to apply.
    native: an 8-bit grey or colour JPEG, for simplejpeg or a backend's own decoder.
    scans: a JPEG with several scans, all of which are needed.
    """

    format: str
    height: int
    width: int
    orientation: int = 1
    native: bool = False
    scans: bool = False

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width before the orientation is applied."""
        return (self.height, self.width) if self.orientation < 5 else (self.width, self.height)


def rejected(error: Exception) -> Reject:
    """The Reject for an exception of a decoder."""
    text = f"{type(error).__name__}: {error}"
    low = text.lower()
    if isinstance(error, MemoryError):
        return Reject("too many pixels", f"not enough memory to decode it ({text})")
    if "truncated" in low or "eof" in low:
        return Reject("truncated", text)
    if (
        isinstance(error, NotImplementedError)
        or "cannot handle" in low
        or "unsupported" in low
        or "pixel mode" in low
    ):
        return Reject("unsupported mode", text)
    return Reject("corrupt", text)
