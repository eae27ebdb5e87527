"""The column of a Parquet file that holds images, and one of its values as an image."""

import io
import json
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.formats.files import npy
from raypipe.data.tables import frame
from raypipe.errors import UsageError
from raypipe.images.header import Reject

_IMAGE_COLUMNS = (
    "image",
    "bytes",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "content",
    "image_bytes",
    "img",
    "data",
    "pixels",
    "tensor",
)
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\x93NUMPY")
_TENSORS = (
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_variable_shaped_tensor",
    "arrow.fixed_shape_tensor",
)


def image_column(schema: pa.Schema, uri: str, extensions: dict[str, tuple[str, bytes]]) -> str:
    """The column that holds the images.

    Raises:
        UsageError: there is none, or several are possible.
    """
    named, encoded, tensors = set(), [], []
    for column in schema:
        extension = extensions.get(column.name, ("",))[0]
        deep = depth(column.type)
        if extension == "ray.data.arrow_pickled_object":
            continue
        if holds_bytes(column.type):
            encoded.append(column.name)
        elif extension in _TENSORS or deep == 3 or is_shaped(column.type):
            tensors.append(column.name)
        elif deep == 2 or (deep == 1 and {"height", "width"} <= {*schema.names}):
            named.add(column.name)  # grey or flat pixels, but only if the name says so
    alone = [of[0] for of in (encoded, tensors) if len(of) == 1]
    for name in (*_IMAGE_COLUMNS, *alone):
        if name in named or name in encoded or name in tensors:
            return name
    raise UsageError(
        f"{uri!r} has no column with images that can be told by its name or as the only one of "
        "bytes or tensors: its columns are "
        f"{', '.join(f'{column.name} ({column.type})' for column in schema)}. "
        "Name it 'image', and write encoded bytes or whole numbers"
    )


def holds_bytes(type: pa.DataType) -> bool:
    """Whether values are encoded images, or Hugging Face's structs that contain one."""
    if pa.types.is_struct(type):
        return any(
            type.field(i).name == "bytes" and holds_bytes(type.field(i).type)
            for i in range(type.num_fields)
        )
    return any(
        is_(type)
        for is_ in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
            pa.types.is_fixed_size_binary,
        )
    )


def is_shaped(type: pa.DataType) -> bool:
    """Whether values are Ray's tensors of different shapes: a flat list `data` and its `shape`."""
    fields = (
        {type.field(i).name: type.field(i).type for i in range(type.num_fields)}
        if pa.types.is_struct(type)
        else {}
    )
    return {*fields} == {"data", "shape"} and all(is_list(of) for of in fields.values())


def is_list(type: pa.DataType) -> bool:
    """Whether values are lists of any kind."""
    return (
        pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)
    )


def depth(type: pa.DataType) -> int:
    """How deep lists of whole numbers are nested; 0 for anything else."""
    depth = 0
    while is_list(type):
        type, depth = type.value_type, depth + 1
    return depth if pa.types.is_integer(type) else 0


class _Nothing(pickle.Unpickler):
    """Unpickles tuples and numbers, and refuses every class and function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def shape_of(extension: str, parameters: bytes) -> tuple[int, ...] | None:
    """The shape of all tensors of a column, by its extension type; None if unknown or different."""
    if extension not in _TENSORS:
        return None
    try:
        found = json.loads(parameters)
    except ValueError:
        try:  # Ray 2.49 to 2.54
            found = _Nothing(io.BytesIO(parameters)).load()
        except Exception:  # foreign bytes
            return None
    if isinstance(found, dict):
        moved = found.get("permutation") or []
        found = found.get("shape") if list(moved) == sorted(moved) else None
    is_shape = isinstance(found, list | tuple) and all(
        type(side) is int and side >= 0 for side in found
    )
    return tuple(found) if is_shape else None


def pixels(where: str, values: pa.Array, shape: tuple[int, ...] | None) -> bytes | Reject:
    """A tensor of whole numbers from 0 to 255 as an RGB image, in the bytes of a .npy file.

    It is (height, width), or has 1, 3 or 4 channels, last or first.
    """
    nested: list[int] = []
    while is_list(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if not lengths or lengths == [0]:
            return Reject("empty", f"{where}: no pixels")
        if len(lengths) != 1 or lengths[0] is None:
            return Reject("corrupt", f"{where}: its rows are not of one length")
        nested.append(lengths[0])
        values = values.flatten()
    if not pa.types.is_integer(values.type):
        return Reject(
            "unsupported mode",
            f"{where}: numbers of type {values.type} have no range to map to 8 bits",
        )
    numbers = values.to_numpy(zero_copy_only=False)
    if values.null_count or numbers.min() < 0 or numbers.max() > 255:
        return Reject("unsupported mode", f"{where}: its numbers are not all from 0 to 255")
    array = numbers.astype(np.uint8).reshape(shape or nested)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        return Reject(
            "unsupported mode",
            f"{where}: a tensor of shape {array.shape} is no image: give (height, width, 3)",
        )
    return npy(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3])


def image_at(
    where: str,
    table: pa.Table,
    name: str,
    row: int,
    *,
    shape: tuple[int, ...] | None,
    raw: bool,
) -> bytes | Reject:
    """The image in column `name` of a row: encoded bytes, or pixels as the bytes of a .npy file.

    Args:
        where: the file and row, for a reject.
        shape: of every tensor of the column, if they have one.
        raw: bytes that can be raw pixels are.
    """
    column = table[name].slice(row, 1)
    type = column.type
    if is_list(type) or is_shaped(type):
        if not column[0].is_valid:
            return _nothing(where)
        values = column.combine_chunks()
        if is_list(type):
            return pixels(where, values, shape or _said(table, row, depth(type)))
        return pixels(where, values.field("data"), tuple(values.field("shape")[0].as_py() or ()))
    value = column[0].as_py()
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            return Reject("unreadable", f"{where}: holds no bytes, only the path {value['path']!r}")
        value = value["bytes"]
    if value is None:
        return _nothing(where)
    if not value:
        return Reject("empty", f"{where}: zero bytes")
    height, width = _sides(table, row)
    # A small PNG may have this length by chance, and raw pixels may begin like a JPEG. So raypipe
    # marks its own files.
    fits = len(value) == height * width * 3
    if fits and (raw or not value.startswith(_MAGIC)):
        return npy(np.frombuffer(value, np.uint8).reshape(height, width, 3))
    return value


def _nothing(where: str) -> Reject:
    return Reject("empty", f"{where}: no bytes")


def _sides(table: pa.Table, row: int) -> tuple[int, int]:
    """Height and width of an image by the columns of these names; 0, 0 if they do not say."""
    if not {"height", "width"} <= {*table.column_names}:
        return 0, 0
    return frame({name: table[name][row].as_py() for name in ("height", "width")})


def _said(table: pa.Table, row: int, depth: int) -> tuple[int, ...] | None:
    """The shape of a flat list of pixels, by the columns `height` and `width`."""
    height, width = _sides(table, row)
    return (height, width, -1) if depth == 1 and height else None
