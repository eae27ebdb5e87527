"""Settings are composed of groups, and what decides the results is the deciding groups, whole."""

import json
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

from raypipe import UsageError
from raypipe.run import predict, preprocess
from raypipe.run.settings import Running, parse
from raypipe.train import settings as train

JOBS = {
    preprocess.Settings: {"input": "demo", "output": "out"},
    predict.Settings: {"input": "demo", "output": "out", "checkpoint": "c"},
    train.Settings: {"input": "demo", "storage": "out"},
}
NEVER = {"limit", "output", "storage", "report", "run_id", "resume", "actors", "writers", "workers"}
"""What must never decide the results."""

STOOD_FOR = {"recipe", "draw_score", "holdout_input", "holdout_annotations", "model_arguments"}
"""Fields that another key of the identity stands for."""


@pytest.mark.parametrize("kind", JOBS, ids=lambda kind: kind.__module__.rpartition(".")[2])
def test_every_setting_is_in_one_group_and_every_group_decides_or_not(kind):
    names = kind.names()
    assert len(names) == len(set(names))
    for field, group in kind.groups().items():
        assert is_dataclass(group) and group.__dataclass_params__.frozen, field
        assert isinstance(group.decides, bool), f"{group.__name__} must say whether it decides"
        assert callable(group.check)
        if not group.decides:
            continue
        assert not NEVER & {one.name for one in fields(group)}, group
    assert Running in kind.groups().values()


@pytest.mark.parametrize("kind", (preprocess.Settings, train.Settings))
def test_each_field_of_a_deciding_group_is_in_the_identity_of_the_results(kind):
    settings = kind.of(**JOBS[kind])
    decided = settings.decided()
    json.dumps(decided)
    for group in kind.groups().values():
        for field in fields(group):
            if group.decides and field.name not in STOOD_FOR - decided.keys() - {"holdout"}:
                assert field.name in decided or field.name == "holdout", field.name
            if not group.decides:
                assert field.name not in decided, field.name


def test_settings_have_flat_names_and_can_be_changed_by_them():
    settings = preprocess.Settings.of(input="demo", output="out", actors=3, quality=90)
    assert (settings.source.input, settings.running.actors, settings.stored.quality) == (
        "demo",
        3,
        90,
    )
    assert settings.flat["max_pixels"] == settings.decoding.max_pixels
    assert list(settings.flat) == preprocess.Settings.names()
    other = settings.changed(backend="torchvision", limit=5)
    assert (other.decoding.backend, other.running.limit, other.running.actors) == (
        "torchvision",
        5,
        3,
    )
    assert other.changed(backend="opencv", limit=None) == settings
    assert settings.changed(limit=5).decided() == settings.decided() != other.decided()


def test_flags_are_the_flat_names():
    words = [
        "--input",
        "demo",
        "--output",
        "out",
        "--actors",
        "3",
        "--writers",
        "auto",
        "--no-resume",
        "--read-ms",
        "1.5",
    ]
    given = parse(preprocess.Settings, words, description=None)
    wanted = {"actors": 3, "writers": "auto", "resume": False, "read_ms": 1.5}
    assert given == preprocess.Settings.of(input="demo", output="out", **wanted)


def test_unknown_and_missing_names_are_told():
    with pytest.raises(UsageError, match="no setting 'actor'; did you mean 'actors'"):
        preprocess.Settings.of(input="demo", actor=3)
    with pytest.raises(UsageError, match="input is missing"):
        preprocess.Settings.of(output="out")


def test_values_of_python_code_become_what_a_flag_would_be_or_are_refused(tmp_path):
    given = preprocess.Settings.of(
        input=tmp_path, output=tmp_path / "out", actors=np.int64(3), max_pixels=1e8, read_ms="1.5"
    )
    words = ["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--actors", "3"]
    words += ["--max-pixels", "100000000", "--read-ms", "1.5"]
    assert given == parse(preprocess.Settings, words, description=None)
    assert json.loads(json.dumps(given.flat))["actors"] == 3
    for refused, why in (
        ({"input": ["photos"]}, r"input is \['photos'\]; it must be a valid string"),
        ({"actors": "many"}, "actors is 'many'; it must be a valid integer or 'auto'"),
        ({"limit": 2.5}, "limit is 2.5; it must be a valid integer"),
        ({"format": "gif"}, "format is 'gif'; it must be 'jpeg', 'png', "),
        ({"labels": "folders"}, "labels is 'folders'; it must be 'folder'"),
        ({"seed": None}, "seed is None; it must be a valid integer"),
    ):
        with pytest.raises(UsageError, match=why):
            preprocess.Settings.of(**{"input": "demo"} | refused)


def test_what_a_training_left_open_is_what_a_prediction_takes_over():
    given = predict.DecodingAsTrained(backend="torchvision")
    trained = {"backend": "opencv", "max_pixels": 7.0, "decoder": "own", "actor_memory": 9.0}
    decoding = given.after(trained)
    assert (decoding.backend, decoding.max_pixels, decoding.decoder) == ("torchvision", 7, "own")
    assert (decoding.actor_memory, decoding.damaged) == (2.0, "reject")
    assert {one.name for one in fields(given)} == {one.name for one in fields(decoding)}
