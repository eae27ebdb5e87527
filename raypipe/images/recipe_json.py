"""Recipes as JSON: written, and read strictly, with errors that say where and what instead."""

import dataclasses
import json
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from raypipe.errors import UsageError, did_you_mean, foreign, shown
from raypipe.images.ops import augment, boxes, colour, filters, geometry, random_geometry
from raypipe.images.ops.op import PURPOSES, Op
from raypipe.images.own import imported
from raypipe.images.recipe import Finish, Recipe

_BUILT_IN: tuple[type[Op], ...] = (
    colour.Contrast,
    colour.Greyscale,
    colour.Gamma,
    colour.Equalize,
    colour.AutoContrast,
    filters.Sharpness,
    colour.CLAHE,
    geometry.Resize,
    geometry.ShortSide,
    geometry.Crop,
    geometry.CenterCrop,
    filters.GaussianBlur,
    filters.Median,
    filters.Bilateral,
    filters.NonLocalMeans,
    boxes.SanitizeBoxes,
    augment.HorizontalFlip,
    augment.VerticalFlip,
    augment.ColorJitter,
    augment.PhotometricDistort,
    random_geometry.ZoomOut,
    random_geometry.IoUCrop,
    random_geometry.RandomCrop,
    random_geometry.MultiScale,
    random_geometry.LargeScaleJitter,
    random_geometry.RandomResizedCrop,
    random_geometry.RandomAffine,
    augment.Noise,
    augment.Erasing,
    geometry.Flip,
    colour.Brightness,
    colour.Saturation,
    colour.Hue,
    colour.Permute,
    geometry.Affine,
    augment.AddNoise,
    augment.Erase,
    geometry.Pad,
    geometry.PadTo,
)

OPS: dict[str, type[Op]] = {op.__name__: op for op in _BUILT_IN}
"""The built-in ops by their names in JSON, in the order in which messages list them."""

_REMEDY = "`raypipe recipes NAME` prints one that is right."


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as json.dumps takes it. `from_json` makes an equal recipe of it."""
    ops = [{"op": _op_name(type(op)), **_fields(op)} for op in recipe.ops]
    finish = None if recipe.finish is None else _fields(recipe.finish)
    return {**_fields(recipe), "ops": ops, "finish": finish}


def from_json(
    source: Mapping[str, Any] | str | Path, *, trusted: Collection[str] | None = None
) -> Recipe:
    """Make a recipe from a JSON object, or from the path of a file with one.

    Args:
        trusted: own ops, "module:Class", that the recipe may name. None: any, for a recipe that the
            user wrote or named. A recipe in a checkpoint is somebody else's.

    Raises:
        UsageError: an unknown op or field, a missing field, a value of a wrong type or range. The
            message says where it is, and what would be right.
    """
    if isinstance(source, str | Path):
        return _from_file(Path(source))
    return _from_content(source, trusted)


def _from_file(path: Path) -> Recipe:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: not a file name
        raise UsageError(
            f"recipe file {path} cannot be read: {getattr(error, 'strerror', error)}"
        ) from error
    with foreign(f"the recipe file {path}", remedy=_REMEDY):
        try:
            content = json.loads(data)
        except ValueError as error:
            raise UsageError(f"recipe file {path} is not JSON: {error}") from error
    try:
        return _from_content(content, None)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _from_content(source: Any, trusted: Collection[str] | None) -> Recipe:
    """Make a recipe from parsed JSON, where a string is not a file name."""
    where = f"recipe {shown(source.get('name', ''))}" if isinstance(source, Mapping) else "recipe"
    with foreign(where, remedy=_REMEDY):
        return _from_mapping(source, where, trusted)


def _from_mapping(source: Any, where: str, trusted: Collection[str] | None) -> Recipe:
    fields = dict(_object(source, where))
    ops = fields.get("ops", [])
    if not isinstance(ops, list | tuple):
        raise UsageError(
            f'{where}: ops is {shown(ops)}; it must be a list of objects like {{"op": "Greyscale"}}'
        )
    made: dict[str, Any] = {}
    if "ops" in fields:
        made["ops"] = tuple(
            _op(op, f"{where}, op {index}", trusted) for index, op in enumerate(ops)
        )
    if fields.get("finish") is not None:
        place = f"{where}, finish"
        made["finish"] = _build(Finish, _object(fields["finish"], place), place)
    return _build(Recipe, {**fields, **made}, where, checked=frozenset(made))


def _op(source: Any, where: str, trusted: Collection[str] | None) -> Op:
    fields = dict(_object(source, where))
    name = fields.pop("op", None)
    if not isinstance(name, str):
        raise UsageError(
            f'{where}: no "op" with the name of an op in {shown(source)}; known ones are '
            f"{', '.join(OPS)}"
        )
    return _build(_op_class(name, where, trusted), fields, f"{where} ({name})")


def _op_class(name: str, where: str, trusted: Collection[str] | None) -> type[Op]:
    if name in OPS:
        return OPS[name]
    if ":" not in name:
        raise UsageError(
            f"{where}: unknown op {name!r}{did_you_mean(name, OPS)}; own ops are written "
            "module:Class"
        )
    found = imported(name, what=f"{where}: own op", trusted=trusted)
    if (
        not dataclasses.is_dataclass(found)
        or not isinstance(found, type)
        or getattr(found, "purpose", None) not in PURPOSES
    ):
        raise UsageError(
            f"{where}: {name!r} is no op: an op is a dataclass with a line `purpose: ClassVar[str] "
            f"= ...`, one of {', '.join(PURPOSES)}"
        )
    return typing.cast(type[Op], found)


def _op_name(cls: type) -> str:
    return cls.__name__ if OPS.get(cls.__name__) is cls else f"{cls.__module__}:{cls.__qualname__}"


def _fields(item: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(item, field.name)) for field in dataclasses.fields(item)}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _object(source: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(source, Mapping):
        raise UsageError(f"{where}: {shown(source)} must be an object with named fields")
    return source


_Built = typing.TypeVar("_Built")


def _build(
    cls: type[_Built],
    fields: Mapping[str, Any],
    where: str,
    checked: frozenset[str] = frozenset(),
) -> _Built:
    """Make a dataclass of JSON fields; those in `checked` have their right type already."""
    kind: type = cls
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            raise UsageError(f"{where}: unknown field {name!r}{did_you_mean(name, known)}")
    for name, field in known.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in fields:
            raise UsageError(f"{where}: field {name!r} is missing")
    kinds = typing.get_type_hints(cls)
    values = {
        name: value
        if name in checked
        else _converted(value, kinds[name], f"{where}: field {name!r}")
        for name, value in fields.items()
    }
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _converted(value: Any, kind: Any, where: str) -> Any:
    """The value as its field's type: an int may stand for a float, and a list for a tuple.

    Raises:
        UsageError: it is not of that type.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in parts:
            raise UsageError(f"{where} is {shown(value)}{did_you_mean(value, parts)}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        (kind,) = (part for part in parts if part is not type(None))
        return _converted(value, kind, where)
    if origin is tuple:
        any_length = parts[-1] is ...
        if not isinstance(value, list | tuple) or (not any_length and len(value) != len(parts)):
            length = "" if any_length else f"{len(parts)} "
            raise UsageError(
                f"{where} is {shown(value)}; it must be a list of {length}{parts[0].__name__}"
            )
        return tuple(
            _converted(item, parts[0], f"{where}[{index}]") for index, item in enumerate(value)
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and (
        not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
    ):
        raise UsageError(f"{where} is {shown(value)}; it must be of type {kind.__name__}")
    return value
