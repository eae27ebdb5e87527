"""The layout of Hugging Face's datasets in Parquet: its columns, and what it says of itself.

An image is a struct of its encoded bytes and a path. Whole-image labels are a column `label`. Boxes
are a struct of lists, `objects`: `bbox` (left, top, width, height) and `category`. The schema's
metadata has the features, by which `datasets.load_dataset` shows images and the names of labels.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe.data.tables import BOXES, box_lists, has_nulls, images_of, lists_of, real, unlist

Holds = Literal["label", "objects"] | None
"""What an image has beside its pixels: one label of the whole image, or objects with boxes."""

_KEY = b"huggingface"
_GROUP = 100  # images of a row group, as the library writes
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def holds(rows: pa.Table) -> Holds:
    """What all rows have, by the columns boxes and labels of a table (schema SOURCE or WORK)."""
    boxes, labels = (pc.list_value_length(rows.column(name)) for name in ("boxes", "labels"))
    if pc.max(boxes).as_py():
        return "objects"
    return "label" if rows.num_rows and pc.all(pc.equal(labels, 1)).as_py() else None


# --- writing ---------------------------------------------------------------------------------


def huggingface_of(
    block: pa.Table,
    encode: Callable[[np.ndarray, str, int], bytes],
    quality: int,
    *,
    holds: Holds,
    classes: tuple[str, ...],
) -> memoryview:
    """The good rows of a block (schema BLOCK) as a Parquet file of JPEGs.

    Args:
        classes: the name of each label from 0 on; empty: labels are plain numbers.
    """
    images = [image for image in images_of(block) if image is not None]
    block = block.filter(pc.is_valid(block["image"]))
    encoded = [encode(image, "jpeg", quality) for image in images]
    paths = [f"{name}.jpg" for name in block["name"].to_pylist()]
    columns: dict[str, pa.Array] = {
        "image": pa.StructArray.from_arrays(
            [pa.array(encoded, pa.binary()), pa.array(paths, pa.string())], fields=list(_IMAGE)
        ),
        "image_id": block["image_id"].combine_chunks(),
    }
    number = _value("int64")
    named = {"names": list(classes), "_type": "ClassLabel"} if classes else number
    features: dict[str, Any] = {"image": {"_type": "Image"}, "image_id": _value("string")}
    if holds == "label":
        columns["label"] = block["labels"].combine_chunks().flatten()
        features["label"] = named
    elif holds == "objects":
        columns["objects"] = _objects(block)
        box = {"feature": _value("float32"), "length": 4, "_type": "Sequence"}
        features["objects"] = {
            "bbox": {"feature": box, "_type": "Sequence"},
            "category": {"feature": named, "_type": "Sequence"},
            "is_crowd": {"feature": _value("bool"), "_type": "Sequence"},
            "id": {"feature": number, "_type": "Sequence"},
        }
    table = pa.table(columns).replace_schema_metadata(
        {_KEY: json.dumps({"info": {"features": features}}).encode()}
    )
    sink = pa.BufferOutputStream()
    # JPEGs cannot be compressed further, and dictionaries of them would be in memory twice.
    pq.write_table(table, sink, row_group_size=_GROUP, compression="none", use_dictionary=False)
    return memoryview(sink.getvalue())


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}


def _objects(block: pa.Table) -> pa.StructArray:
    boxes = unlist(block["boxes"])
    counts = [len(of) for of in boxes]
    flat = np.concatenate(boxes) if boxes else np.empty((0, 4), np.float32)
    flat = np.concatenate([flat[:, :2], flat[:, 2:] - flat[:, :2]], axis=1)
    # An image of boxes may have labels of the whole image instead; these are no objects.
    others = [
        lists_of(
            counts, block[name].combine_chunks().filter(pa.array(np.array(counts) > 0)).flatten()
        )
        for name in ("labels", "crowds", "annotation_ids")
    ]
    return pa.StructArray.from_arrays(
        [box_lists(counts, flat), *others], names=["bbox", "category", "is_crowd", "id"]
    )


# --- reading ---------------------------------------------------------------------------------

_OURS = {
    "bbox": "boxes",
    "category": "labels",
    "categories": "labels",
    "is_crowd": "crowds",
    "iscrowd": "crowds",
    "id": "annotation_ids",
}


def flattened(table: pa.Table) -> pa.Table:
    """The table with columns boxes, labels, ... instead of `objects`, if that has boxes."""
    if "objects" not in table.column_names or "boxes" in table.column_names:
        return table
    objects = table["objects"].combine_chunks()
    table = table.drop_columns(["objects"])
    for name, values in _fields(objects).items():
        ours = _OURS.get(name)
        if ours is not None and ours not in table.column_names:
            table = table.append_column(ours, values)
    return table


def _fields(objects: pa.Array) -> dict[str, pa.Array]:
    """The lists of `objects` by name; none without boxes. It is a struct of lists, or the lists'
    structs."""
    type_ = objects.type
    fields: dict[str, pa.Array] = {}
    if pa.types.is_struct(type_):
        names = [type_.field(at).name for at in range(type_.num_fields)]
        fields = {name: pc.struct_field(objects, name) for name in names}
    elif pa.types.is_list(type_) and pa.types.is_struct(type_.value_type):
        counts, flat = objects.value_lengths().fill_null(0), objects.flatten()
        names = [type_.value_type.field(at).name for at in range(type_.value_type.num_fields)]
        fields = {name: lists_of(counts, pc.struct_field(flat, name)) for name in names}
    if "bbox" not in fields or not {"category", "categories"} & fields.keys():
        return {}
    return {**fields, "bbox": _corners(fields["bbox"])}


def _corners(boxes: pa.Array) -> pa.Array:
    """Lists of left, top, width, height as lists of corners. A null for what is no such box."""
    try:
        cast = boxes.cast(BOXES)
        if not has_nulls(cast):
            flat = cast.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
            corners = np.concatenate([flat[:, :2], flat[:, :2] + flat[:, 2:]], axis=1)
            return box_lists(cast.value_lengths().fill_null(0).to_numpy(False), corners)
    except (pa.ArrowException, ValueError):
        pass
    of_rows = [of if isinstance(of, list) else [] for of in boxes.to_pylist()]
    return pa.array([[_corner(box) for box in of] for of in of_rows], BOXES)


def _corner(box: Any) -> list[float] | None:
    try:
        left, top, width, height = map(real, box)
    except (TypeError, ValueError):
        return None
    return [left, top, left + width, top + height]


def classes_of(metadata: Mapping[bytes, bytes]) -> tuple[str, ...]:
    """The names of the labels by the metadata of a schema; empty if it does not say."""
    try:
        features = json.loads(metadata[_KEY])["info"]["features"]
        for found in (features.get("label"), _category(features.get("objects"))):
            if isinstance(found, dict) and found.get("_type") == "ClassLabel":
                return tuple(str(name) for name in found["names"])
    except Exception:  # foreign text, or none
        return ()
    return ()


def _category(objects: Any) -> Any:
    """The feature of one category of `objects`, in any of the layouts of the library."""
    if not isinstance(objects, dict):
        return None
    inner = objects.get("feature", objects)
    category = inner.get("category", inner.get("categories"))
    return category.get("feature", category) if isinstance(category, dict) else None
