"""Checkpoints: a training run in a folder, enough to go on from, to predict with and to identify.

    about.json  what decides the run (model, classes, recipe, ...), its progress, and which rows it
                has seen; the size of the other file
    state.pt    weights, optimizer, random states: tensors and plain values only

Each file is written whole, and about.json last. So a folder counts as a checkpoint exactly when it
is complete, on a local disk and in an object store.

Reading a checkpoint cannot run code: torch's weights_only loader reads state.pt, and the rest is
JSON and Parquet. A checkpoint may name something outside raypipe (a model, an op, a class in the
state). That is imported only if the user trusts it by name.
"""

import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch

from raypipe.data.journal import Dropped, Rejected
from raypipe.data.location import Location
from raypipe.data.outputs import differences
from raypipe.data.tables import whole
from raypipe.errors import UsageError, foreign, printable, shown, words
from raypipe.images.own import imported
from raypipe.images.recipe_json import OPS
from raypipe.models.detection import MODELS

VERSION = 2
"""Version of the format. Raise it when older code could not read a folder, or would misread it."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is. Counts of rows and images are of all epochs together.

    epoch: the one in progress; those before it are complete.
    rows: accounted for, which is trained on or rejected.
    images: trained on.
    damaged: of these images, those that a decoder or a checksum calls damaged (--damaged keep).
    rejects: a row for each image: image_id, uri, reason, detail.
    epochs: the reported figures of each complete epoch.
    dropped: boxes that could not be used, each once (journal.Dropped).
    boxes_from: number of images by the frame in which their boxes were drawn.
    """

    epoch: int = 0
    step: int = 0
    rows: int = 0
    images: int = 0
    damaged: int = 0
    rejects: list[dict[str, str]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    boxes_from: dict[str, int] = field(default_factory=dict)

    @property
    def rejected(self) -> int:
        """Rejected rows. An image counts once in each epoch."""
        return self.rows - self.images


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is in a checkpoint.

    settings: what decides the weights, as JSON types.
    seen: which rows were trained on or rejected, as JSON types (`train.position.to_state`).
    state: tensors and plain values, by name.
    """

    settings: dict[str, Any]
    progress: Progress
    seen: dict[str, Any]
    state: dict[str, Any]


def save(folder: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into `folder`, a local path or URI. It counts once this has returned.

    Raises one of stores.ERRORS.
    """
    state = io.BytesIO()
    torch.save(checkpoint.state, state)
    place, data = Location.of(folder), state.getbuffer()
    # Delete the about.json of an earlier checkpoint first: its other file is replaced now.
    (place / "about.json").delete()
    place.write("state.pt", data, tmp="")
    about = {
        "version": VERSION,
        "settings": checkpoint.settings,
        "progress": asdict(checkpoint.progress),
        "seen": checkpoint.seen,
        "bytes": {"state.pt": data.nbytes},
        "attempt": _parent(Location.of(folder)),
    }
    place.write("about.json", json.dumps(about, indent=1).encode(), tmp="")


def about(folder: str) -> dict[str, Any] | None:
    """Read about.json. None: the folder is no checkpoint, or one that was not finished.

    Raises:
        UsageError: it was made by another version of the format, or cannot be read.
    """
    try:
        data = (Location.of(folder) / "about.json").read()
    except FileNotFoundError:
        return None
    with foreign(f"{folder}/about.json", remedy=_OTHER) as place:
        found = json.loads(data)
        version = found["version"]
    if version != VERSION:
        raise UsageError(
            f"{folder} is a checkpoint of format version {shown(version)}; this raypipe reads "
            f"version {VERSION}. Use the raypipe that made it, or start anew in another --storage."
        )
    with foreign(f"{folder}/about.json", remedy=_OTHER) as place:
        place.at = "settings"
        found["settings"].keys()
        place.at = "bytes"
        found["bytes"] = {"state.pt": whole(found["bytes"]["state.pt"])}
        place.at = "seen"
        found["seen"].keys()
        place.at = "progress"
        _progress(found)
    return found


_OTHER = "It is unknown what this checkpoint is. Delete the folder to go on from the one before it."


def _progress(about: Mapping[str, Any]) -> Progress:
    progress = Progress(**about["progress"])
    for row in progress.rejects:
        Rejected(**row)
    for box in progress.dropped:
        Dropped(**box)
    if not all(isinstance(epoch, dict) for epoch in progress.epochs):
        raise TypeError("its epochs are objects")
    if not all(isinstance(count, int) for count in progress.boxes_from.values()):
        raise TypeError("its boxes_from are numbers by name")
    epoch, step, rows = whole(progress.epoch), whole(progress.step), whole(progress.rows)
    return replace(
        progress,
        epoch=epoch,
        step=step,
        rows=rows,
        images=whole(progress.images),
        damaged=whole(progress.damaged),
    )


def load(folder: str, *, trusted: Collection[str] = ()) -> Checkpoint:
    """Read a checkpoint into the CPU's memory.

    Loading a state into a model copies it to the model's device. An optimizer leaves its step
    counts where they are; on a GPU, each step would wait for them.

    Args:
        trusted: classes, "module:name", that its state may hold beside tensors and plain values.

    Raises:
        UsageError: there is none, it is of another version, or its files have another size than
            those that were written.
    """
    found = about(folder)
    if found is None:
        raise UsageError(
            f"{folder!r} is no checkpoint: there is no about.json in it. Give the folder of one."
        )
    place, size = Location.of(folder) / "state.pt", found["bytes"]["state.pt"]
    try:
        data = place.read()
    except FileNotFoundError:
        data = b""
    if len(data) != size:
        raise UsageError(
            f"{place} has {len(data)} bytes, {size} were written: it is damaged. "
            f"Delete {folder} to go on from the checkpoint before it."
        )
    return Checkpoint(
        settings=found["settings"],
        progress=_progress(found),
        seen=found["seen"],
        state=_state(data, str(place), trusted),
    )


def _state(data: bytes, where: str, trusted: Collection[str]) -> dict[str, Any]:
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        outside = [":".join(name.rpartition(".")[::2]) for name in named]
        if unknown := [name for name in outside if name not in trusted]:
            raise UsageError(f"{where} cannot be loaded safely: it holds {_refused(unknown)}")
        classes = [imported(name, what=f"{where}: the class", trusted=trusted) for name in outside]
        with torch.serialization.safe_globals(classes):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # pickle and zip raise many kinds
        raise UsageError(
            f"{where} cannot be loaded safely: {words(error)}. Use another checkpoint."
        ) from error


def check_trusted(settings: Mapping[str, Any], folder: str, trusted: Collection[str]) -> None:
    """Check that a checkpoint's `settings` name no code outside raypipe but what is `trusted`.

    Nothing is imported.

    Raises:
        UsageError: they do; the remedy names all of it.
    """
    with foreign(f"{folder}/about.json", remedy="Use another checkpoint."):
        named = [op["op"] for op in settings["recipe"]["ops"] if op["op"] not in OPS]
        if settings["model"]["name"] not in MODELS:
            named.insert(0, settings["model"]["name"])
    if unknown := [name for name in dict.fromkeys(named) if name not in trusted]:
        raise UsageError(f"The checkpoint {folder} names {_refused(unknown)}")


def _refused(names: Sequence[str]) -> str:
    shown = [printable(str(name)) for name in names]
    return (
        f"code that is no part of raypipe: {', '.join(shown)}. Loading it would run code that the "
        f"checkpoint's author chose, so nothing was loaded. If you know that code, add "
        f"{' '.join(f'--trust {name}' for name in shown)}"
    )


def progress_of(folder: str) -> Progress:
    """Read how far the training of a finished checkpoint is, without its weights."""
    found = about(folder)
    assert found is not None
    return _progress(found)


def seen_by(folder: str) -> dict[str, Any]:
    """Read which rows a finished checkpoint has seen (`Checkpoint.seen`), without its weights."""
    found = about(folder)
    assert found is not None
    return dict(found["seen"])


def find(where: str) -> str:
    """Find the checkpoint at `where`: that folder, or the most trained one below a --storage.

    Raises:
        UsageError: there is none.
    """
    try:
        found = [where] if about(where) is not None else all_in(where)
    except NotADirectoryError:
        found = []
    if not found:
        raise UsageError(
            f"There is no checkpoint in {where!r}: it has no about.json, and neither has a folder "
            f"below it. Give the folder of a checkpoint, or the --storage of a training that "
            f"finished at least an epoch."
        )
    return found[-1]


def identity(folder: str) -> dict[str, Any]:
    """What identifies the weights in `folder`, wherever it is moved: progress and a digest."""
    progress = progress_of(folder)
    digest = blake2b((Location.of(folder) / "state.pt").read(), digest_size=8).hexdigest()
    return {"epoch": progress.epoch, "step": progress.step, "digest": digest}


def name_of(progress: Progress) -> str:
    """The folder's name.

    It has the epoch, because a checkpoint of an epoch's last step and that of its end have the
    same step.
    """
    return f"checkpoint-{progress.epoch:04d}-{progress.step:09d}"


def all_in(storage: str) -> list[str]:
    """List the finished checkpoints one or two levels below `storage`, the least trained first."""
    found = []
    for place in _folders(storage):
        one = about(str(place))
        if one is not None and not (place / _DELETING).exists():
            progress = _progress(one)
            found.append((progress.rows, progress.step, str(place)))
    return [folder for _, _, folder in sorted(found)]


def _folders(storage: str) -> Iterator[Location]:
    """The folders one or two levels below `storage` that are named as checkpoints."""
    top = Location.of(storage)
    for outer in top.folders():
        inner = top / outer
        for place in [inner, *(inner / name for name in inner.folders())]:
            if place.name.startswith("checkpoint-"):
                yield place


def check_same(folder: str, settings: Mapping[str, Any]) -> None:
    """Check that the checkpoint was made with `settings`, so that training can go on from it.

    Raises:
        UsageError: it was not; the message shows each difference.
    """
    found = about(folder)
    assert found is not None
    changed = differences(found["settings"], json.loads(json.dumps(settings)))
    if changed:
        raise UsageError(
            f"{folder} is of a training with other settings; going on from it would give a model "
            f"of neither:\n{changed}\nUse another --storage, or the settings it was made with, or "
            f"--no-resume to delete its checkpoints and start again."
        )


_FILES = ("about.json", "state.pt")
_DELETING = "deleting"
"""A file that marks a checkpoint of which some files may be gone: deleting it goes on."""


def prune(storage: str, keep: Sequence[str] = ()) -> list[str]:
    """Delete the checkpoints that trainings made below `storage`, except those to keep.

    Of each, only the files that raypipe writes are deleted. Copies that somebody put elsewhere
    stay, and so does what a symbolic link leads to. A deletion that was interrupted goes on.

    Returns:
        A line for each checkpoint that was left, with the reason.
    """
    left = []
    for place in _folders(storage):
        if str(place) in keep:
            continue
        try:
            ours = (place / _DELETING).exists() or _is_own(place)
        except UsageError as error:
            left.append(f"{error} {place} was left alone.")
            continue
        if not ours:
            continue
        if not place.within(Location.of(storage)):
            left.append(f"{place} leads out of {storage}. It was not deleted.")
            continue
        place.write(_DELETING, b"", tmp="")
        for name in (*_FILES, _DELETING):
            (place / name).delete()
        place.delete_empty()
    return left


def _is_own(place: Location) -> bool:
    """Whether a training made this checkpoint where it is, and finished it."""
    found = about(str(place))
    # Older checkpoints do not say where they were made.
    return found is not None and found.get("attempt") in (None, _parent(place))


def _parent(place: Location) -> str:
    """The name of the folder that a checkpoint is in: of the attempt that made it."""
    return place.path.rstrip("/").rpartition("/")[0].rpartition("/")[2]
