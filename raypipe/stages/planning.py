"""What is done to the images of a shard: the settings, and each row's ops before it is decoded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from raypipe.data.reader import CHUNK_BYTES, CHUNK_ROWS
from raypipe.data.tables import frames_of
from raypipe.images.decode import read_header
from raypipe.images.frames import into_picture
from raypipe.images.header import MAX_PIXELS, NO_ROOM, UNREAD, Header, Reject
from raypipe.images.memory import MOST, needed
from raypipe.images.recipe import Plan, Recipe


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What decides the pixels of a shard: the same settings and rows always give the same bytes.

    memory: bytes that a shard's images may take in an actor. They are the results of all images,
        and what one image takes while it is decoded and transformed. Larger images are rejected.
    gives_back: an image that fits alone, but not beside the rest of its shard, is UNREAD with the
        detail NO_ROOM: a smaller shard does it. Otherwise it is rejected.
    image_seconds: of CPU. An image that takes more ends the process; its successor rejects it.
    decoder: of JPEGs, one of raypipe.images.DECODERS.
    damaged: "reject" an image that a decoder or a checksum calls damaged, or "keep" what can be
        decoded of it.
    decode_only: leave images as they are decoded, and boxes as in the source: another device does
        the recipe's ops later. Images that the ops would reject are rejected here all the same.
    """

    recipe: Recipe
    backend: str
    seed: int = 0
    max_pixels: int = MAX_PIXELS
    memory: int = 1_750_000_000
    gives_back: bool = True
    image_seconds: float = 30.0
    decoder: str = "simplejpeg"
    damaged: str = "reject"
    decode_only: bool = False

    @property
    def done_here(self) -> Recipe:
        """The recipe, without its ops if another device does them."""
        return replace(self.recipe, ops=()) if self.decode_only else self.recipe


@dataclass(frozen=True, slots=True)
class Planned:
    """An image that can be decoded: its bytes, its header and its sampled ops."""

    data: bytes
    header: Header
    plan: Plan
    boxes_from: str | None = None


def bytes_of(plan: Plan) -> int:
    """The bytes of an image as its ops leave it."""
    return plan.size[0] * plan.size[1] * 3


class Planner:
    """Samples the ops of a shard's images, and checks that their memory suffices."""

    def __init__(
        self,
        shard: pa.Table,
        settings: Preprocessing,
        boxes: Sequence[np.ndarray],
        labels: Sequence[np.ndarray],
    ) -> None:
        self._settings, self._boxes, self._labels = settings, boxes, labels
        self._epochs = shard.column("epoch").to_pylist()
        self._image_ids = shard.column("image_id").to_pylist()
        self._recipe, self._here = settings.recipe, settings.done_here
        fixed = self._here.fixed_size
        self._keep = fixed is None
        each = 0 if fixed is None else fixed[0] * fixed[1] * 3
        self._room = _Room(settings, rows=len(boxes), each=each)
        boxed = any(len(of) for of in boxes)
        self._frames = frames_of(shard).tolist() if boxed else []
        # Without chance and boxes, only the size decides the plan. Planning takes 20 us, 1% of a
        # small image.
        self._by_size: dict[tuple[int, int], Plan] | None = (
            None if self._recipe.random or boxed else {}
        )

    def plan(self, row: int, data: bytes) -> Planned:
        """Plan the image of a row.

        Raises:
            Reject: it is no image, does not fit into memory, or its boxes make no sense.
        """
        header = read_header(data, max_pixels=self._settings.max_pixels)
        boxes, labels = self._boxes[row], self._labels[row]
        if len(labels) and len(labels) != len(boxes) and len(boxes):
            raise Reject("bad boxes", f"{len(boxes)} boxes, but {len(labels)} labels")
        size = header.height, header.width
        boxes_from = None
        if len(boxes):
            boxes, boxes_from = into_picture(
                boxes, tuple(self._frames[row]), size, header.orientation
            )
        plan = self._by_size.get(size) if self._by_size is not None else None
        if plan is None:
            plan = self._sampled(row, size, boxes)
        self._room.take(data, header, plan, keep=self._keep)
        return Planned(data, header, plan, boxes_from)

    def _sampled(self, row: int, size: tuple[int, int], boxes: np.ndarray) -> Plan:
        def of(recipe: Recipe) -> Plan:
            return recipe.plan(
                seed=self._settings.seed,
                epoch=self._epochs[row],
                image_id=self._image_ids[row],
                size=size,
                boxes=boxes,
            )

        plan = of(self._recipe)
        if self._here is not self._recipe:
            plan = of(self._here)
        if self._by_size is not None:
            self._by_size[size] = plan
        return plan


class _Room:
    """The memory of a shard.

    Args:
        rows: of the shard.
        each: bytes of a result; memory for all of them is taken from the start.
    """

    def __init__(self, settings: Preprocessing, *, rows: int, each: int) -> None:
        self._settings = settings
        self._backend = settings.backend
        self._each = each
        self._held = rows * each

    def take(self, data: bytes, header: Header, plan: Plan, *, keep: bool) -> None:
        """Take memory for an image while it is worked on.

        Args:
            keep: take memory for its bytes and its result too, until the shard is done.

        Raises:
            Reject: there is not enough, at all or beside the rest of the shard (UNREAD, NO_ROOM).
        """
        kept = len(data) + bytes_of(plan) if keep else 0
        # MOST is a quick upper bound; only an image that exceeds it is looked at closely.
        if self._held + kept + len(data) + MOST * plan.largest > self._settings.memory:
            self._check(data, header, plan, kept=kept, keep=keep)
        self._held += kept

    def _check(self, data: bytes, header: Header, plan: Plan, *, kept: int, keep: bool) -> None:
        settings = self._settings
        decoded = header if settings.decoder == "simplejpeg" else replace(header, native=False)
        reduce = settings.done_here.reduce((header.height, header.width))
        most = needed(decoded, plan.ops, self._backend, reduce=reduce) + len(data) * (not keep)
        if self._held + kept + most <= settings.memory:
            return
        if settings.gives_back and self._each + kept + most <= settings.memory:
            raise Reject(UNREAD, NO_ROOM)
        others = (
            f"; others of its shard take {self._held / 1e9:.2f} GB"
            if self._held > 5_000_000
            else ""
        )
        raise Reject(
            "too large for --actor-memory",
            f"{header.width}x{header.height} pixels ({header.format}) take "
            f"{(kept + most) / 1e9:.2f} GB to decode and transform{others}; "
            f"there are {settings.memory / 1e9:.2f} GB",
        )


def plan_rows(
    read: Iterator[bytes | Reject],
    planner: Planner,
    *,
    killers: Mapping[int, Reject],
    mark: Callable[[int], None],
) -> Iterator[Planned | Reject]:
    """Plan each row that was read, or say why it is rejected."""
    for row, data in enumerate(read):
        if row in killers:
            yield killers[row]
            continue
        if isinstance(data, Reject):
            yield data
            continue
        mark(row)
        try:
            item = planner.plan(row, data)
        except Reject as reject:
            # A new one: the traceback of `reject` would keep the image's bytes.
            yield Reject(reject.reason, reject.detail)
        except Exception as error:
            yield Reject("failed", f"{type(error).__name__}: {error}")
        else:
            yield item


def in_chunks(items: Iterator[Planned | Reject]) -> Iterator[Planned | Reject]:
    """Plan a chunk of rows at once, as many as the reader reads together.

    Decoding an image in between evicts the planner's code from the caches (1% of a small image).
    """
    some: list[Planned | Reject] = []
    size = 0
    for item in items:
        some.append(item)
        size += len(item.data) if isinstance(item, Planned) else 0
        if len(some) == CHUNK_ROWS or size > CHUNK_BYTES:
            yield from some
            some, size = [], 0
    yield from some
