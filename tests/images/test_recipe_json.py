"""Recipes as JSON: read strictly, written back equal."""

import json
import math

import pytest

from raypipe import UsageError
from raypipe.images.catalog import RECIPES
from raypipe.images.ops.random_geometry import ZoomOut
from raypipe.images.recipe_json import from_json, to_json


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip(name, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(to_json(RECIPES[name])))
    assert from_json(str(path)) == RECIPES[name]
    assert hash(from_json(path)) == hash(RECIPES[name])


FINE = {
    "name": "own",
    "ops": [{"op": "Resize", "height": 300, "width": 300}, {"op": "HorizontalFlip"}],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ops": [{"op": "Resise", "height": 1, "width": 1}]},
            r"recipe 'own', op 0: unknown op 'Resise'; did you mean 'Resize'\?",
        ),
        ({"ops": [{"op": "horizontalflip"}]}, "did you mean 'HorizontalFlip'"),
        (
            {"ops": [{"op": "Flip"}, {"op": "Resize", "height": 1}]},
            r"op 1 \(Resize\): field 'width' is missing",
        ),
        (
            {"ops": [{"op": "Resize", "height": 1, "widht": 1}]},
            "unknown field 'widht'; did you mean 'width'",
        ),
        (
            {"ops": [{"op": "Resize", "height": "1", "width": 1}]},
            "field 'height' is '1'; it must be of type int",
        ),
        (
            {"ops": [{"op": "Resize", "height": 1.5, "width": 1}]},
            "field 'height' is 1.5; it must be of type int",
        ),
        ({"ops": [{"op": "Resize", "height": True, "width": 1}]}, "field 'height' is True"),
        (
            {"ops": [{"op": "Resize", "height": 0, "width": 1}]},
            "height is 0; it must be at least 1",
        ),
        ({"ops": [{"op": "HorizontalFlip", "p": 1.5}]}, "p is 1.5; it must be within 0 and 1"),
        ({"ops": [{"op": "IoUCrop", "flavour": "mlpref"}]}, "did you mean 'mlperf'"),
        (
            {"ops": [{"op": "ZoomOut", "scale": [4, 1]}]},
            "scale is .*a range from a smaller to a larger",
        ),
        ({"ops": [{"op": "ZoomOut", "scale": [1]}]}, "must be a list of 2 float"),
        ({"ops": [{"op": "MultiScale", "sizes": [], "long": 5}]}, "sizes"),
        ({"ops": [{"op": "Pad", "fill": [0, 0, 256]}]}, "fill"),
        ({"ops": [{"op": "Affine", "matrix": [1, 1, 0, 1, 1, 0]}]}, "cannot be inverted"),
        (
            {"ops": [{"op": "GaussianBlur", "kernel": 4, "sigma": 1}]},
            "kernel is 4; it must be an odd",
        ),
        ({"ops": ["Flip"]}, "op 0: 'Flip' must be an object"),
        ({"ops": [{"height": 3}]}, 'no "op"'),
        ({"ops": {"op": "Flip"}}, "must be a list"),
        ({"ops": [{"op": "no.such.module:Op"}]}, "cannot be imported"),
        ({"ops": [{"op": "json:JSONDecoder"}]}, "is no op"),
        ({"name": 3}, "field 'name' is 3"),
        ({"finish": {"std": [1, 1, 0]}}, "recipe 'own', finish: std"),
        ({"finish": {"layout": "nchw"}}, "did you mean 'chw'"),
        ({"finish": 3}, "finish: 3 must be an object"),
        ({"reduced_decod": True}, "did you mean 'reduced_decode'"),
        ({"reduced_decode": 1}, "must be of type bool"),
        ({"ops": [{"op": "Brightness", "factor": math.nan}]}, "factor is nan"),
    ],
)
def test_json_errors_say_where_what_and_what_instead(change, message):
    with pytest.raises(UsageError, match=message):
        from_json(FINE | change)


def test_json_numbers_become_what_fields_are():
    made = from_json(
        FINE
        | {"ops": [{"op": "ZoomOut", "scale": [1, 2], "fill": [1, 2, 3]}], "finish": {"scale": 1}}
    )
    assert made.ops == (ZoomOut(scale=(1.0, 2.0), fill=(1, 2, 3)),)
    assert isinstance(made.ops[0].scale[0], float) and isinstance(made.finish.scale, float)


def test_json_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        from_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        from_json(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UsageError, match=r"list.json: recipe: \[\] must be an object"):
        from_json(tmp_path / "list.json")
