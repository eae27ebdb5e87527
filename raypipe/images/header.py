"""What the first bytes of a file say, and why an image is left out."""

from dataclasses import dataclass

MAX_PIXELS = 178_956_970
"""Images with more pixels are rejected from their header: 512 MiB as RGB. Pillow refuses at the same figure by default."""

UNREAD = "unread"
"""The reason of a row whose bytes its store did not give in time. It is no reject: the next run tries again."""

REASONS = (
    UNREAD,
    "empty",
    "not an image",
    "truncated",
    "damaged",  # what can still be decoded is not what was encoded: --damaged keep delivers it
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
"""All reasons for which an image is left out, few enough to count by."""


class Reject(Exception):
    """This one image cannot be processed; the run goes on.

    `reason` is one of REASONS, for counting; `detail` says for a person what exactly is wrong.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(
            reason, detail
        )  # these as args: that is what pickle restores an exception from
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the first bytes of a file say.

    `height` and `width` are those of the upright image. `orientation` is the EXIF number (1..8)
    that decoding still has to apply. `native`: an 8-bit grey or colour JPEG, which simplejpeg or a
    backend's own decoder takes. `scans`: it comes in several, all of which must be there.
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
    """Sorts what a decoder raised into a reason."""
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
