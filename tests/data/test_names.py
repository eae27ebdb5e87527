import unicodedata

import numpy as np

from raypipe.data.listing import list_images
from raypipe.data.names import unique_names


def folded(name: str) -> str:
    """What a file system may make of a name."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def test_unique_names_keep_what_is_fine():
    assert unique_names(["set/a.jpg", "b.v1.png", "c", "ü ö/ß.jpeg", "v1.5"]) == [
        "set/a",
        "b.v1",
        "c",
        "ü ö/ß",
        "v1.5",
    ]


def test_unique_names_of_clashes():
    assert unique_names(["a.jpg", "b.jpg", "a.png"]) == ["a.jpg", "b", "a.png"]
    assert unique_names(["a.jpg", "A.jpg", "a.JPG"]) == ["a.jpg", "A.jpg-2", "a.JPG-3"]
    assert unique_names(["x", "x", "X", "x-2"]) == ["x", "x-3", "X-4", "x-2"]
    caf = ["caf\u00e9.jpg", "cafe\u0301.jpg"]  # composed, decomposed: one file on macOS
    assert len({folded(name) for name in unique_names(caf)}) == 2


def test_unique_names_with_names_already_taken():
    before = unique_names(["a.jpg", "b.jpg"])
    assert before == ["a", "b"]
    assert unique_names(["a.png", "B.jpg", "c.jpg"], taken=before) == ["a.png", "B.jpg", "c"]
    assert unique_names(["a.png"], taken=["a", "A.PNG"]) == ["a.png-2"]


HOSTILE = [
    "../../etc/passwd.jpg",
    "/etc/passwd.jpg",
    "a/../../b.jpg",
    "..",
    ".",
    "",
    "/",
    "//x//y.jpg",
    "./x.jpg",
    ".hidden.jpg",
    ".jpg",
    "new\nline.jpg",
    "tab\t.jpg",
    "nul\0.jpg",
    "back\\slash.jpg",
    "C:\\x.jpg",
    "con.jpg",
    "AUX",
    "lpt1.png",
    "dot.",
    "space ",
    "a?*<>|.jpg",
    "long" * 200 + ".jpg",
    "ü" * 300 + ".jpg",
    "/".join(["deep" * 20] * 100) + "/x.jpg",
    "a.jpg/b.png",
    "a.png",
    "_raypipe/x.jpg",
    "epoch-001/x.jpg",
    "sur\udcffrogate.jpg",
    "line\u2028sep.jpg",
    "part.tar/x.jpg",
    "x.jpg",
    "X.JPG",
    "trailing./y.jpg",
    "...",
    "~/x.jpg",
]


def test_hostile_names_become_safe_files(tmp_path):
    result = unique_names(HOSTILE)
    assert len({folded(name) for name in result}) == len(HOSTILE)
    for name in result:
        for extension in (
            ".jpg",
            ".npy",
        ):  # each can be created, below the root, beside all the others
            path = tmp_path / extension[1:] / (name + extension)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb"):
                pass
            assert path.resolve().is_relative_to(tmp_path)
        parts = name.split("/")
        assert all(part not in ("", ".", "..") and not part.startswith(".") for part in parts)
        assert all(part == part.rstrip(". ") and len(part.encode()) <= 240 for part in parts)
        assert parts[0] != "_raypipe" and not parts[0].startswith("epoch-001/")
        assert not set(name) & set('\n\t\0\\:*?"<>|\u2028')
        assert len(name.encode()) <= 1300
    listed = list_images(str(tmp_path / "jpg"))  # none of them hidden from the next run
    assert listed.num_rows == len(HOSTILE)


def test_unique_names_are_unique_whatever_comes():
    rng = np.random.default_rng(0)
    atoms = [
        "a",
        "A",
        "b",
        ".jpg",
        ".png",
        "-2",
        "-3",
        "/",
        "..",
        ".",
        "é",
        "e\u0301",
        "\n",
        "a.jpg",
    ]
    for _ in range(300):
        wanted = ["".join(rng.choice(atoms, rng.integers(1, 5))) for _ in range(30)]
        first, second = unique_names(wanted[:20]), unique_names(wanted)
        assert len({folded(name) for name in second}) == 30
        assert second == unique_names(wanted)
        added = unique_names(wanted[20:], taken=first)
        assert len({folded(name) for name in first + added}) == 30
