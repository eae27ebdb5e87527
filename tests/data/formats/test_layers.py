"""Formats stand below listing, reading and writing: which modules of data/ each may import."""

import pytest

from tests.test_imports import PACKAGE, imported

MAY_IMPORT = {"tables", "names", "location", "stores", "shapes", "formats"}


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "data/formats").glob("*.py")), ids=lambda p: p.name
)
def test_a_format_imports_only_what_is_below_it(path):
    found = {name.split(".")[2] for name in imported(path) if name.startswith("raypipe.data.")}
    assert found <= MAY_IMPORT, f"{path.name} imports {found - MAY_IMPORT}"


def test_a_location_is_below_all_that_uses_it():
    for name, may in (
        ("location", {"local", "names", "patience", "stores"}),
        ("names", set()),
        ("patience", {"stores"}),
        ("stores", set()),
        ("local", set()),
    ):
        names = imported(PACKAGE / f"data/{name}.py")
        found = {one.split(".")[2] for one in names if one.startswith("raypipe.data.")}
        assert found <= may, f"{name} imports {found - may}"
