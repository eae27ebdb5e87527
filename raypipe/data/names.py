"""Names: which files are images, and safe unique names for the results."""

import functools
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from raypipe.errors import printable

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jif",
    ".jfif",
    ".jfi",
    ".pjpeg",
    ".pjp",
    ".png",
    ".apng",
    ".webp",
    ".bmp",
    ".dib",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
    ".npy",
)
"""A file is listed as an image if its name ends so, in upper or lower case."""

STATE = "_raypipe"
"""The folder of a run's own files in its output. Sources never list it."""

TAR = (".tar",)
PARQUET = (".parquet", ".pq")
PACKED = {
    ".tar.gz": "gunzip -k",
    ".tgz": "gunzip -k",
    ".tar.bz2": "bunzip2 -k",
    ".tbz2": "bunzip2 -k",
    ".tar.xz": "unxz -k",
    ".txz": "unxz -k",
    ".tar.zst": "unzstd",
    ".tzst": "unzstd",
    ".tar.lz4": "unlz4 -k",
}
"""Compressed tars, and the command that unpacks one.

Rows are offsets in a file, so images in a compressed tar cannot be read in place.
"""

OUTSIDE = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00\\]")
"""Matches names that may lead out of their folder.

They have an empty part, `.` or `..`, a backslash or NUL.
"""

_MAX_COMPONENT = 200  # bytes; file systems allow 255, and extensions and `-12` are added
_MAX_NAME = 1000  # bytes; PATH_MAX is 4096, and 1024 on macOS
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"|?*\\\u2028\u2029\ud800-\udfff]')
# File names that Windows reserves.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE | re.DOTALL)
# The sinks' own folders, as the first component.
_OURS = re.compile(r"_raypipe|epoch-\d+", re.IGNORECASE)
_LIKE_A_FILE = (*SUFFIXES, *TAR, *PARQUET, ".json", ".cls")


def suffix_of(path: str) -> str:
    """The suffix by which a file that is no image is counted: in lower case, `.tar.gz` whole."""
    base = path.rpartition("/")[2].lower()
    packed = next((suffix for suffix in PACKED if base.endswith(suffix)), None)
    suffix = packed or posixpath.splitext(base)[1]
    return printable(suffix, 20) if suffix else "(no suffix)"


def unique_names(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Output names, without extension, for names in a source: `set/a.jpg` becomes `set/a`.

    Each is a relative posix path without `..`, safe on Linux, macOS and Windows. No two are equal,
    nor equal to one of `taken`, even if case and Unicode normalisation are ignored. Names that
    clash keep their extension: `a.jpg` and `a.png`. If they still clash, they get `-2`, `-3`, ...
    in order. With the names of an earlier listing as `taken`, rows can be added without renaming.
    """
    parts = [_safe_name(name) for name in names]
    keys = [_fold(stem) for stem, _ in parts]
    count = Counter(keys)
    used = {_fold(name) for name in taken}
    out: list[str | None] = []
    for (stem, _), key in zip(parts, keys, strict=True):
        free = count[key] == 1 and key not in used
        out.append(stem if free else None)
    used.update(key for key, name in zip(keys, out, strict=True) if name is not None)
    repeats: Counter[str] = Counter()
    for index, name in enumerate(out):
        if name is not None:
            continue
        wanted = "".join(parts[index])
        candidate = wanted
        key = _fold(wanted)
        while _fold(candidate) in used:
            repeats[key] += 1
            candidate = f"{wanted}-{repeats[key] + 1}"
        used.add(_fold(candidate))
        out[index] = candidate
    return out  # type: ignore[return-value]


def _fold(name: str) -> str:
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _safe_name(source: str) -> tuple[str, str]:
    """The source's path made safe, without its image extension; and that extension, or ""."""
    folder, _, base = source.rpartition("/")
    stem, suffix = posixpath.splitext(base)
    if suffix.lower() not in SUFFIXES:
        stem, suffix = base, ""
    prefix = _safe_folder(folder)
    if (
        _PLAIN.fullmatch(stem) is None
        or _RESERVED.fullmatch(stem)
        or (not prefix and _OURS.fullmatch(stem))
    ):
        stem = _safe_component(stem or "_", first=not prefix)
    name = prefix + stem
    if len(name) > _MAX_NAME // 4 and len(name.encode()) > _MAX_NAME:
        name = f"long-{blake2b(prefix.encode(), digest_size=8).hexdigest()}/{stem}"
    return name, suffix


@functools.lru_cache(maxsize=1 << 16)
def _safe_folder(folder: str) -> str:
    """The folders made safe, with a slash at the end; or ""."""
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    safe: list[str] = []
    for part in parts:
        part = _safe_component(part, first=not safe)
        # A folder `a.jpg/` would block the file `a.jpg` of the image `a`.
        safe.append(part + "_" if part.lower().endswith(_LIKE_A_FILE) else part)
    return "".join(part + "/" for part in safe)


def _safe_component(part: str, *, first: bool) -> str:
    safe = _UNSAFE.sub("_", part)
    if safe == "..":
        return "_"
    if safe.startswith("."):  # as an input, the output would lose hidden files
        safe = "_" + safe
    if safe.endswith((".", " ")) or _RESERVED.fullmatch(safe) or (first and _OURS.fullmatch(safe)):
        safe += "_"
    encoded = safe.encode()
    if len(encoded) > _MAX_COMPONENT:
        digest = blake2b(part.encode(errors="surrogatepass"), digest_size=4).hexdigest()
        safe = encoded[: _MAX_COMPONENT - 9].decode(errors="ignore") + "-" + digest
    return safe
