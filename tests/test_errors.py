import json

import pytest

from raypipe.errors import UsageError, foreign, printable, words


def test_whatever_foreign_bytes_raise_becomes_one_error_with_file_place_cause_and_remedy():
    for bad, cause in (
        ("[" * 100_000, "nested too deep"),
        ("{}", "KeyError: 'rows'"),
        ('{"rows": [{"n": 1}, {"n": 1e999}]}', "row 1: OverflowError"),
        ('{"rows": [{"n": 1}, null]}', "row 1: TypeError"),
        ("\x00", "JSONDecodeError"),
    ):
        with (
            pytest.raises(UsageError) as caught,
            foreign("the list 'x.json'", remedy="Delete it.") as place,
        ):
            for number, row in enumerate(json.loads(bad)["rows"]):
                place.at = ("row", number)
                int(row["n"])
        text = str(caught.value)
        assert (
            text.startswith("cannot read the list 'x.json'")
            and cause in text
            and text.endswith("Delete it.")
        ), text
        assert "\n" not in text


def test_what_means_something_else_goes_through():
    for error in (
        FileNotFoundError(2, "gone"),
        UsageError("said better already"),
        KeyboardInterrupt(),
    ):
        with (
            pytest.raises(type(error)) as caught,
            foreign("x", remedy="", passes=(FileNotFoundError,)),
        ):
            raise error
        assert caught.value is error


def test_messages_are_one_printable_line_however_hostile_their_text():
    text = words(ValueError("a\n\x1b[2Jb\ud800" + "c" * 10_000))
    assert (
        text.startswith("ValueError: a \\x1b[2Jb\\ud800ccc")
        and len(text) < 400
        and text.isprintable()
    )
    assert words(MemoryError()) == "not enough memory for it" and words(KeyError()) == "KeyError"
    assert words(OSError(5, "Input/output error")) == "[Errno 5] Input/output error"
    assert printable("naïve 名.jpg") == "naïve 名.jpg"
