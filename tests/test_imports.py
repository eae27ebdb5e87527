"""The house rules that keep the parts apart, read from the source and from fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raypipe"

# jobs, cli -> sweep -> train -> run -> stages -> models -> data -> images -> errors; insight alone.
MAY_IMPORT = {
    "images": {"images"},
    "data": {"data", "images"},
    "models": {"models", "data", "images"},
    "stages": {"stages", "models", "data", "images"},
    "run": {"run", "stages", "models", "data", "images", "insight"},
    "train": {"train", "run", "stages", "models", "data", "images", "insight"},
    "sweep": {"sweep", "train", "run", "stages", "models", "data", "images", "insight"},
    "insight": {"insight"},
    "watch.py": {"insight"},
    "manifest.py": set(),
    "cli.py": {"watch", "manifest", "sweep", "train", "run", "data", "images", "insight"},
    "__init__.py": {"run", "train"},  # inside functions: see the test of what importing brings in
    "errors.py": set(),
}
FOR_ALL = {"errors"}
MAY_USE_RAY = {"run", "train"}


def imported(path: Path) -> set[str]:
    """Every module that `path` imports, anywhere in it. In `from x import y`, y may be a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_one_way(path):
    for name in imported(path):
        parts = name.split(".")
        if (
            parts[0] == "raypipe"
            and len(parts) > 1
            and any((PACKAGE / f"{parts[1]}{end}").exists() for end in ("", ".py"))
        ):
            assert parts[1] in MAY_IMPORT[room(path)] | FOR_ALL, f"{path.name} imports {name}"
        if parts[0] == "ray":
            assert room(path) in MAY_USE_RAY, f"{path.name} imports {name}"


def test_rays_internals_are_touched_in_one_room_only():
    inside = [
        p
        for p in PACKAGE.rglob("*.py")
        if any(m.split(".")[0] == "ray" and "._" in m for m in imported(p))
    ]
    assert inside and {path.parent for path in inside} == {PACKAGE / "run" / "cluster"}


IMPORT = """
import importlib, sys
_, heavy, *modules = sys.argv
for module in modules:
    importlib.import_module(module)
    if found := set(heavy.split()) & set(sys.modules):
        print(module, "brings in", *found)
        break
"""


# What must bring in nothing of the same is asked in one process: each takes 1 to 7 s of CPU.
@pytest.mark.parametrize(
    ("heavy", "modules"),
    [
        ("ray torch cv2 numpy pyarrow", "raypipe"),
        (
            "ray torch cv2 numpy",
            "raypipe.insight.html raypipe.insight.screen raypipe.sweep.page raypipe.watch",
        ),
        ("ray torch cv2", "raypipe.insight.report"),
        (
            "ray torch",
            "raypipe.images.opencv raypipe.data.sinks raypipe.data.cutouts raypipe.images.drawing "
            "raypipe.stages.stage raypipe.stages.preprocess raypipe.stages.write "
            "raypipe.models.evaluate raypipe.cli",
        ),
        ("ray", "raypipe.models.detection raypipe.models.checkpoint"),
        ("torch cv2 numpy ray.data", "raypipe.run.live.collector"),
        ("torch ray.data ray.train", "raypipe.run.command"),
        ("torch ray.data", "raypipe.stages.actor raypipe.run.meter"),
        ("torch", "raypipe.run.preprocess raypipe.train.board raypipe.sweep.command"),
    ],
)
def test_importing_one_thing_does_not_bring_in_another(heavy, modules):
    command = [sys.executable, "-c", IMPORT, heavy, *modules.split()]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout == ""


def test_planning_a_run_by_torchvision_leaves_torch_to_the_actors():
    code = (
        "import sys; from raypipe.run.preprocess import Settings, plan; "
        "plan(Settings.of(input='demo:4', backend='torchvision', recipe='coco-300-pt')); "
        "print('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "False"


def test_jobs_stay_short_and_leave_ray_to_the_package():
    for path in (ROOT / "jobs").glob("*.py"):
        # run/__init__.py sets what Ray reads before anyone imports it
        assert not [name for name in imported(path) if name.split(".")[0] == "ray"], path
        assert len(path.read_text().splitlines()) < 100, path
