"""WebDataset tars: their images and sidecars, and how a shard becomes one.

Rows are ranges of bytes of the tar, so `raypipe.data.reader` reads members as it reads files.

A `.json` or `.cls` member is a sidecar. It belongs to the image with its full name (`a.0.jpg.json`)
or its full stem (`a.0.json` to `a.0.jpg`). Else, as in WebDataset, it belongs to the images whose
key is its stem (`a.json` to `a.left.jpg` and `a.right.jpg`); a key is the name up to its first dot.
A sidecar may stand anywhere in the tar.
"""

import io
import json
import posixpath
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raypipe.data.formats import tarstream
from raypipe.data.formats.files import HIDDEN
from raypipe.data.formats.tarstream import MAX_MEMBER_BYTES
from raypipe.data.location import Location
from raypipe.data.names import SUFFIXES, suffix_of
from raypipe.data.stores import ERRORS
from raypipe.data.tables import Listed, flag, frame, images_of, real, rows, text, whole
from raypipe.errors import UsageError, logger, printable, words

log = logger(__name__)

_MOST = 1 << 62  # bytes of a member: a header may claim more than a table holds
_SIDECARS = (".json", ".cls")


@dataclass(frozen=True, slots=True)
class _Member:
    """An image, or a sidecar with its `content`.

    run: a number that adjacent members of one key share.
    """

    path: str
    run: int
    offset: int = 0
    length: int = 0
    content: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """The annotations of one image."""

    image_id: str | None = None
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)
    annotation_ids: list[int] = field(default_factory=list)
    frame: tuple[int, int] = (0, 0)


# --- listing ---------------------------------------------------------------------------------


def list_tar(place: Location, limit: int | None) -> Listed:
    """The images of a tar in its order, with the annotations of their sidecars.

    The whole tar is read, even with a `limit`, because sidecars may come after all images. A tar
    that breaks off gives the members before the break, and a warning.

    Raises:
        UsageError: it is no tar, or its store fails.
    """
    skipped: Counter[str] = Counter()
    images: list[_Member] = []
    sidecars: list[_Member] = []
    for member in _members(place, skipped):
        (images if member.content is None else sidecars).append(member)
    joined, left_over = join_sidecars(
        [one.path for one in images], [one.run for one in images], sidecars
    )
    for member in left_over:
        skipped[suffix_of(member.path)] += 1
    if left_over:
        first = printable(left_over[0].path)
        why = "belong to no image in it, or to one that has another"
        log.warning(
            "%s: %d .json or .cls files %s; they are ignored. The first is %s",
            place,
            len(left_over),
            why,
            first,
        )
    images = images if limit is None else images[:limit]
    found, bad = [], []
    alone = Counter(id(member) for of in joined for member in of.values())
    for member, of in zip(images, joined, strict=False):
        try:
            sidecar = parse_sidecar(
                *(of[kind].content if kind in of else None for kind in _SIDECARS)
            )
        except Exception as error:  # foreign text: this image goes without annotations
            bad.append((member.path, words(error)))
            sidecar = Sidecar()
        found.append((sidecar, all(alone[id(one)] == 1 for one in of.values())))
    if bad:
        first = f"that of {printable(bad[0][0])}: {bad[0][1]}"
        why = "make no sense; their images go without annotations"
        log.warning("%s: %d .json or .cls files %s. The first is %s", place, len(bad), why, first)
    # A sidecar of several images gives none of them its id.
    own = [sidecar.image_id if single else None for sidecar, single in found]
    stems = [posixpath.splitext(member.path)[0] for member in images]
    # `tar_of` writes the dots of a name as %2E, because a key ends at its first dot.
    names = [
        member.path if one is None else member.path.replace("%2E", ".").replace("%25", "%")
        for member, one in zip(images, own, strict=True)
    ]
    known = [sidecar for sidecar, _ in found]
    table = rows(
        [text(stem if one is None else one) for stem, one in zip(stems, own, strict=True)],
        [text(name) for name in names],
        [place.uri] * len(images),
        [member.offset for member in images],
        [member.length for member in images],
        boxes=[one.boxes for one in known],
        labels=[one.labels for one in known],
        crowds=[one.crowds for one in known],
        annotation_ids=[one.annotation_ids for one in known],
        frames=[one.frame for one in known],
    )
    return Listed(table, skipped)


def _members(place: Location, skipped: Counter[str]) -> Iterator[_Member]:
    """The images and sidecars of a tar, in its order; other members are counted in `skipped`."""
    count = 0
    key, run = None, 0
    places: dict[str, tuple[int, int]] = {}  # of the images so far, as links may lead to them
    try:
        for info, read in tarstream.members(place):
            count += 1
            base = posixpath.basename(info.name)
            if info.isdir():
                continue
            if base.startswith("."):
                skipped[HIDDEN] += 1
                continue
            if (here := _key(info.name)) != key:
                key, run = here, run + 1
            lower = info.name.lower()
            if lower.endswith(SUFFIXES):
                found = _place(info, places)
                if found is None:
                    skipped["(link to nothing, or sparse)"] += 1
                    continue
                places[posixpath.normpath(info.name)] = found
                yield _Member(info.name, run, *found)
            elif lower.endswith(_SIDECARS) and info.isreg() and not info.issparse():
                content = read() if info.size <= MAX_MEMBER_BYTES else b""
                yield _Member(info.name, run, content=_needed(content))
            else:
                skipped[suffix_of(base)] += 1
    except UsageError:
        raise
    except Exception as error:  # foreign bytes: tarfile raises many kinds of errors
        if count and isinstance(error, ERRORS):
            raise UsageError(
                f"cannot read the tar {str(place)!r} to its end: {words(error)}. "
                "Nothing was started"
            ) from error
        if count == 0:
            raise UsageError(
                f"cannot read the tar {str(place)!r}: {words(error)}. It must exist and be an "
                "uncompressed tar; unpack .tar.gz first, because images inside it cannot be "
                "reached one by one"
            ) from error
        log.warning(
            "%s breaks off after %d members (%s); what came after is lost",
            place,
            count,
            words(error),
        )
        skipped["(tar that breaks off)"] += 1


def _place(info: tarfile.TarInfo, places: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """The offset and length of a member's bytes; None if they are nowhere in the tar.

    A link has those of the image among `places` that it leads to.
    """
    if info.isreg():
        return None if info.issparse() else (info.offset_data, min(info.size, _MOST))
    if info.islnk():
        return places.get(posixpath.normpath(info.linkname))
    if info.issym():
        return places.get(
            posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
        )
    return None


# --- which sidecar belongs to which image ----------------------------------------------------


def join_sidecars(
    images: list[str], runs: list[int], sidecars: Iterable[_Member]
) -> tuple[list[dict[str, _Member]], list[_Member]]:
    """The sidecars of each image by their suffix (.json, .cls), and the sidecars of no image.

    Args:
        images: paths in the tar, in order.
        runs: `_Member.run` of each.
    """
    by: dict[str, dict[str, list[int]]] = {
        name: defaultdict(list) for name in ("path", "stem", "key")
    }
    for at, path in enumerate(images):
        by["path"][path].append(at)
        by["stem"][posixpath.splitext(path)[0]].append(at)
        by["key"][_key(path)].append(at)
    joined: list[dict[str, _Member]] = [{} for _ in images]
    waiting = list(sidecars)
    for how in ("path", "stem", "key"):  # from the closest match to the loosest
        left = []
        for sidecar in waiting:
            stem, suffix = posixpath.splitext(sidecar.path)
            kind = suffix.lower()
            free = [at for at in by[how].get(stem, ()) if kind not in joined[at]]
            beside = [at for at in free if runs[at] == sidecar.run]
            # Images of one path are separate samples, as in two joined tars: one sidecar each.
            taken = {images[at]: at for at in reversed(beside or free)}
            for at in taken.values():
                joined[at][kind] = sidecar
            if not taken:
                left.append(sidecar)
        waiting = left
    return joined, waiting


def _key(path: str) -> str:
    """WebDataset's key: the path up to the first dot of its last component."""
    folder, slash, base = path.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


_READ = ("image_id", "boxes", "labels", "crowds", "annotation_ids", "height", "width")
_SMALL = 512  # bytes of text that are not worth parsing twice


def _needed(content: bytes) -> bytes:
    """What `parse_sidecar` reads of a sidecar: captions and polygons of a whole tar may be GBs."""
    if len(content) <= _SMALL:
        return content
    try:
        found = json.loads(content)
        kept = {name: found[name] for name in _READ if name in found}
        return json.dumps(kept, separators=(",", ":")).encode()
    except Exception:  # foreign text, or a .cls: parsing it again tells what is wrong
        return content


def parse_sidecar(json_: bytes | None, cls: bytes | None) -> Sidecar:
    """The annotations in .json (as `tar_of` writes it) and .cls. For nonsense, any exception."""
    found = json.loads(json_) if json_ is not None else {}
    image_id = found.get("image_id") if isinstance(found, dict) else None
    image_id = None if image_id is None else str(image_id)
    of_image = [whole(cls)] if cls is not None else []
    if not isinstance(found, dict) or not isinstance(found.get("boxes"), list):
        return Sidecar(image_id=image_id, labels=of_image)
    boxes = [[real(value) for value in box] for box in found["boxes"]]
    labels = [whole(label) for label in found.get("labels", [])]
    crowds = [flag(crowd) for crowd in found.get("crowds", [False] * len(boxes))]
    annotation_ids = [whole(number) for number in found.get("annotation_ids", range(len(boxes)))]
    if any(len(box) != 4 for box in boxes) or not (
        len(boxes) == len(crowds) == len(annotation_ids)
    ):
        raise ValueError("lengths differ")
    if len(labels) != len(boxes) and boxes:
        raise ValueError("as many labels as boxes are needed")
    return Sidecar(
        image_id=image_id,
        boxes=boxes,
        labels=labels or of_image,
        crowds=crowds,
        annotation_ids=annotation_ids,
        frame=frame(found),
    )


# --- writing ---------------------------------------------------------------------------------

_TOLD = ("image_id", "name", "height", "width", "boxes", "labels", "crowds", "annotation_ids")


def tar_of(
    block: pa.Table, encode: Callable[[np.ndarray, str, int], bytes], quality: int
) -> memoryview:
    """The good rows of a block (schema BLOCK) as a tar: `key.jpg`, `key.json`, perhaps `key.cls`.

    Equal rows give equal bytes.
    """
    rows = block.select(_TOLD).to_pylist()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for row, image in zip(rows, images_of(block), strict=True):
            if image is None:
                continue
            folder, _, base = row["name"].rpartition("/")
            # A key ends at its first dot, so dots in the name are escaped; listing undoes that.
            key = posixpath.join(folder, base.replace("%", "%25").replace(".", "%2E"))
            sidecar = {
                "image_id": row["image_id"],
                "height": row["height"],
                "width": row["width"],
                "boxes": row["boxes"] or [],
                "labels": row["labels"] or [],
                "crowds": row["crowds"] or [],
                "annotation_ids": row["annotation_ids"] or [],
            }
            _add(tar, key + ".jpg", encode(image, "jpeg", quality))
            _add(tar, key + ".json", json.dumps(sidecar).encode())
            if len(sidecar["labels"]) == 1 and not sidecar["boxes"]:
                _add(tar, key + ".cls", str(sidecar["labels"][0]).encode())
    return buffer.getbuffer()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults: mtime 0, uid 0, gid 0, mode 644
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
