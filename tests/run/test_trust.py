"""Names in a checkpoint are imported only where the user trusts them. No Ray is started."""

import json
from pathlib import Path

import pytest
import torch

from raypipe import UsageError
from raypipe.images.ops.geometry import Resize
from raypipe.images.recipe import Recipe
from raypipe.images.recipe_json import from_json, to_json
from raypipe.models import checkpoint as checkpoints
from raypipe.models.checkpoint import Checkpoint, Progress
from raypipe.run import predict
from raypipe.run.settings import parse
from raypipe.stages.predict import load
from raypipe.train.settings import Settings as Train
from tests.models.toy import Toy

RECIPE = to_json(Recipe(name="r", ops=(Resize(height=32, width=32),)))
OWN = """
import os
from dataclasses import dataclass
from typing import ClassVar
os.mkdir({mark!r})
@dataclass(frozen=True)
class Op:
    purpose: ClassVar[str] = "neutral"
"""


class Kept:
    """A class that a model of the user's own may keep in its state."""

    def __init__(self) -> None:
        self.value = 7


def put(
    folder: Path,
    *,
    model: str = "tests.models.toy:Toy",
    arguments: dict | None = None,
    recipe: dict = RECIPE,
    **state,
) -> str:
    settings = {
        "model": {"name": model, "arguments": arguments or {}},
        "classes": [7],
        "amp": "off",
        "backend": "opencv",
        "max_pixels": 10**6,
        "recipe": recipe,
    }
    weights = Toy(2).state_dict()
    checkpoints.save(
        str(folder),
        Checkpoint(
            settings=settings, progress=Progress(), seen={}, state={"model": weights, **state}
        ),
    )
    return str(folder)


def job(folder: str, out: Path, *trust: str):
    return predict.predicting(
        predict.Settings.of(checkpoint=folder, input="demo:2", output=str(out), trust=trust)
    )


def test_a_checkpoint_that_names_torch_hub_runs_nothing(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/hubconf.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\ndef evil(**_): pass\n"
    )
    arguments = {"repo_or_dir": str(tmp_path / "repo"), "model": "evil", "source": "local"}
    folder = put(tmp_path / "c", model="torch.hub:load", arguments=arguments)
    with pytest.raises(
        UsageError, match=r"torch\.hub:load.*nothing was loaded.*add --trust torch\.hub:load$"
    ):
        job(folder, tmp_path / "out")
    with pytest.raises(
        UsageError, match=r"add --trust torch\.hub:load"
    ):  # the actors' own look at it
        load(folder, torch.device("cpu"))
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_own_models_and_ops_need_trust_by_name_and_then_work(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (tmp_path / "ownops.py").write_text(OWN.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = {**RECIPE, "ops": [{"op": "ownops:Op"}, *RECIPE["ops"]]}
    folder = put(tmp_path / "c", recipe=recipe)
    with pytest.raises(UsageError, match=r"add --trust tests\.models\.toy:Toy --trust ownops:Op$"):
        job(folder, tmp_path / "out")
    with pytest.raises(UsageError, match=r"add --trust ownops:Op$"):
        job(folder, tmp_path / "out", "tests.models.toy:Toy")
    assert not mark.exists()
    with pytest.raises(UsageError, match="own op 'ownops:Op' is no part of raypipe"):
        from_json(recipe, trusted=("ownops:Other",))
    assert not mark.exists()
    assert len(from_json(recipe).ops) == 2 and mark.exists()  # the user's own file
    folder = put(tmp_path / "d")
    assert job(folder, tmp_path / "out", "tests.models.toy:Toy").todo.work.num_rows == 2


def test_a_recipe_in_a_checkpoint_is_no_name_of_a_file(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({**RECIPE, "ops": [{"op": "antigravity:Op"}]}))
    folder = put(tmp_path / "c", model="ssd_tiny", recipe=str(tmp_path / "own.json"))  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        job(folder, tmp_path / "out")


def test_classes_in_the_state_are_refused_with_the_remedy_and_then_loaded(tmp_path):
    folder = put(tmp_path / "c", extra=Kept())
    name = f"{__name__}:Kept"
    with pytest.raises(UsageError, match=rf"cannot be loaded safely.*add --trust {name}$"):
        checkpoints.load(folder)
    assert checkpoints.load(folder, trusted=(name,)).state["extra"].value == 7


def test_the_flag_may_be_given_several_times():
    given = ["--trust", "a:b", "--trust", "c:d"]
    needed = ["--checkpoint", "c", "--input", "demo", "--output", "o"]
    parsed = parse(predict.Settings, [*needed, *given], description=None)
    assert parsed.predicting.trust == ("a:b", "c:d")
    parsed = parse(Train, ["--input", "demo", "--storage", "s", *given], description=None)
    assert parsed.training.trust == ("a:b", "c:d")
    with pytest.raises(UsageError, match="--trust is 'toy'; it is module:name"):
        predict.Settings.of(checkpoint="c", input="demo", output="o", trust=("toy",)).check()
