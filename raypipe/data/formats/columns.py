"""Which column of a Parquet file holds images, and what its tensors say as pixels."""

import io
import json
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.formats.files import npy
from raypipe.errors import UsageError
from raypipe.images.decode import Reject

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
_TENSORS = (
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_variable_shaped_tensor",
    "arrow.fixed_shape_tensor",
)


def image_column(schema: pa.Schema, uri: str, extensions: dict[str, tuple[str, bytes]]) -> str:
    """The column that holds the images. Raises UsageError if there is none, or no telling which."""
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
            named.add(column.name)  # grey pixels, or flat ones: only where the name says so
    alone = [of[0] for of in (encoded, tensors) if len(of) == 1]
    for name in (*_IMAGE_COLUMNS, *alone):
        if name in named or name in encoded or name in tensors:
            return name
    raise UsageError(
        f"{uri!r} has no column with images that can be told by its name or as the only one of bytes or tensors: its columns "
        f"are {', '.join(f'{column.name} ({column.type})' for column in schema)}. Name it 'image', and write encoded bytes or "
        "whole numbers"
    )


def holds_bytes(type: pa.DataType) -> bool:
    """Whether values are encoded images, or structs with one as Hugging Face writes them."""
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
    """Whether values are tensors of different shapes, as Ray stores them: a flat list `data` and its `shape`."""
    fields = (
        {type.field(i).name: type.field(i).type for i in range(type.num_fields)}
        if pa.types.is_struct(type)
        else {}
    )
    return {*fields} == {"data", "shape"} and all(is_list(of) for of in fields.values())


def is_list(type: pa.DataType) -> bool:
    """Whether values are lists, of whatever kind."""
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
    """Reads tuples and numbers, and nothing that has a name."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def shape_of(extension: str, parameters: bytes) -> tuple[int, ...] | None:
    """The shape of all tensors of a column, by its extension type; None if they differ, or it is not known."""
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
    """A tensor of whole numbers from 0 to 255 as an RGB image: (height, width) or with 1, 3 or 4 channels, last or first."""
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
