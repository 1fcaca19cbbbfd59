"""Text files are read in one encoding, and JSON files in the shape that they should have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired

import pytest
from typing_extensions import TypedDict

from cpd.reading import (
    DamagedFileError,
    MissingFileError,
    number_in_environment,
    read_for_display,
    read_json,
    read_json_lines,
    read_text,
)


class Inner(TypedDict):
    count: int


class Shape(TypedDict):
    name: str
    inner: Inner | None
    rates: NotRequired[list[tuple[str, float]]]


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes('{"name": "ü", "inner": null}'.encode("utf-8-sig"))
    assert read_text(path).startswith("{")
    assert read_json(path, Shape) == {"name": "ü", "inner": None}


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_refused_by_name_and_line(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes('# first\nname = "ü"\n'.encode(encoding))
    with pytest.raises(
        DamagedFileError, match=rf"file\.toml is not UTF-8: .*line {1 if encoding == 'utf-16' else 2}"
    ):
        read_text(path)


def test_a_directory_in_place_of_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file.json").mkdir()
    with pytest.raises(DamagedFileError, match=r"file\.json is a directory"):
        read_json(tmp_path / "file.json", Shape)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "not valid JSON"),
        ('{"name": "a", "inner": {"cou', "not valid JSON"),
        ("null", r"file\.json: "),
        ("[]", r"file\.json: "),
        ("{}", "name: "),
        ('{"name": 1, "inner": null}', "name: "),
        ('{"name": "a", "inner": {}}', r"inner\.count: "),
        ('{"name": "a", "inner": {"count": "1"}}', r"inner\.count: "),
        ('{"name": "a", "inner": {"count": true}}', r"inner\.count: "),
        ('{"name": "a", "inner": null, "rates": [["x", 1], ["y"]]}', r"rates\.1\.1: "),
    ],
)
def test_the_wrong_entry_is_named(text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(DamagedFileError, match=rf"file\.json.*{key}|{key}"):
        read_json(path, Shape)
    with pytest.raises(DamagedFileError, match=r"file\.json"):
        read_json(path, Shape)
    default: Shape = {"name": "default", "inner": None}
    assert read_for_display(path, Shape, default) is default


def test_entries_of_other_versions_are_ignored_and_lists_become_tuples(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"name": "a", "inner": {"count": 1, "new": 2}, "rates": [["x", 1]], "more": []}')
    assert read_json(path, Shape) == {"name": "a", "inner": {"count": 1}, "rates": [("x", 1.0)]}


def test_variables_that_hold_no_positive_number_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"A": "", "B": "4(x2)", "C": "-1", "D": "inf", "E": "2.5"}.items():
        monkeypatch.setenv(name, value)
    assert number_in_environment("A", "B", "C", "D", "E", "F") == 2.5
    assert number_in_environment("A", "B", "F") == 0.0


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        read_json(tmp_path / "none", dict[str, Any])
    assert read_for_display(tmp_path / "none", dict[str, Any], {}) == {}


def test_lines_are_numbered_and_a_cut_off_one_is_an_error_in_finished_files_only(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text('{"count": 1}\n{"count": 2}\n{"cou')
    assert list(read_json_lines(path, Inner)) == [{"count": 1}, {"count": 2}]
    with pytest.raises(DamagedFileError, match=r"file\.jsonl ends early"):
        list(read_json_lines(path, Inner, is_finished=True))
    path.write_text('{"count": 1}\n{}\n')
    with pytest.raises(DamagedFileError, match=r"file\.jsonl, line 2: count: "):
        list(read_json_lines(path, Inner))
    path.write_text("")
    assert list(read_json_lines(path, Inner)) == []
    with pytest.raises(DamagedFileError, match=r"file\.jsonl ends early"):
        list(read_json_lines(path, Inner, is_finished=True))
