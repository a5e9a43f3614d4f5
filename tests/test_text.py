"""Text that people write: what is taken as it is, and what is refused by name and line."""

from __future__ import annotations

import json

import pytest

from danceopd.errors import UserError
from danceopd.text import (
    DEEPEST,
    decode,
    json_lines,
    parse_csv,
    parse_json,
    parse_yaml,
    parse_yaml_documents,
    read_json,
    read_text,
    read_yaml,
)

WORDS = "Größe 東京 🎨"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_mark_and_any_line_end_are_taken(tmp_path, mark, end):
    path = tmp_path / "f"
    path.write_bytes(mark + end.join(["a: 1", f"b: {WORDS}", ""]).encode())
    assert read_yaml(path) == {"a": 1, "b": WORDS}
    lines = mark + end.join(['{"a": 1}', "", json.dumps({"b": WORDS}, ensure_ascii=False)]).encode()
    path.write_bytes(lines)
    with open(path, "rb") as file:
        assert list(json_lines(file, "f")) == [(1, {"a": 1}), (3, {"b": WORDS})]
    names, rows = parse_csv(decode(mark + end.join(["a,b", f'1,"{WORDS}"', ""]).encode(), "f"), "f")
    assert (names, list(rows)) == (["a", "b"], [(2, {"a": "1", "b": WORDS})])


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_what_only_python_takes_for_a_line_end_is_text(sign):
    data = json.dumps({"prompt": f"a{sign}b"}, ensure_ascii=False).encode().replace(b"\x0b", b"\\u000b")
    assert [value for _, value in json_lines([data.replace(b"\x0c", b"\\f")], "f")] == [{"prompt": f"a{sign}b"}]
    assert [cells for _, cells in parse_csv(f'p\n"a{sign}b"\n', "f")[1]] == [{"p": f"a{sign}b"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\nb: é".encode("latin-1"), r"f, line 2: not UTF-8 \(byte 0xE9; Latin-1 or Windows-1252\?\)"),
        ("a\r\rb: “x”".encode("cp1252"), "f, line 3: not UTF-8"),
        ("a: 1".encode("utf-16"), "f, line 1: UTF-16, not UTF-8"),
        ("a: 1".encode("utf-32"), "f, line 1: UTF-32, not UTF-8"),
        ("a\nb".encode("utf-16-le"), "f, line 1: holds a NUL byte: UTF-16 without a mark"),
        (b"ok\n\x00\x00", "f, line 2: holds a NUL byte"),
        ("日本".encode("shift-jis"), "f, line 1: not UTF-8"),
        (b"\xed\xa0\x80", "f, line 1: not UTF-8"),
    ],
)
def test_another_encoding_is_refused_by_name_and_line(data, message):
    with pytest.raises(UserError, match=message):
        decode(data, "f")


def test_a_bad_line_costs_that_line():
    lines = [b'{"a": 1}\n', b'{"a": "\xe9"}\n', b"{\n", b"[1]\n", b'{"a": 1, "a": 2}\n', b'{"a": 2}']
    found = list(json_lines(lines, "f"))
    assert [number for number, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found if isinstance(value, dict)] == [{"a": 1}, {"a": 2}]
    said = [str(value) for _, value in found if isinstance(value, UserError)]
    for line, message in zip(
        said, ("line 2: not UTF-8", "line 3: not valid JSON", "line 4: not a JSON object", "line 5: not"), strict=True
    ):
        assert message in line
    with pytest.raises(UserError, match="f, line 1: UTF-16"):
        list(json_lines(['{"a": 1}'.encode("utf-16")], "f"))
    names, rows = parse_csv('a,b\n1,2\n1\n1,2,3\n3,4\n"open', "f")
    assert names == ["a", "b"]
    assert [value if isinstance(value, dict) else str(value) for _, value in rows] == [
        {"a": "1", "b": "2"},
        "f, line 3: 1 cells, the first line names 2",
        "f, line 4: 3 cells, the first line names 2",
        {"a": "3", "b": "4"},
        "f, line 6: not CSV (unexpected end of data)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "key 'a' is there twice"),
        ('{"x": {"a": 1, "b": 2, "a": 2}}', "key 'a' is there twice"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ("[" * 3000 + "]" * 3000, f"nested more than {DEEPEST} deep"),
        ('{"a":' * 200_000, f"nested more than {DEEPEST} deep"),
        ("1" * 5000, "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1] x", "not valid JSON"),
    ],
)
def test_json_that_loses_or_breaks_is_refused(text, message):
    with pytest.raises(UserError, match=f"^w: .*{message}"):
        parse_json(text, "w")


def test_json_as_deep_as_people_write_it_is_taken():
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "w")
    assert parse_json('{"a": "\\ud83c\\udfa8"}', "w") == {"a": "🎨"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 2", "line 3, column 1: key 'a' is there twice"),
        ("x:\n  a: 1\n  a: 1", "line 3, column 3: key 'a' is there twice"),
        ("{a: 1, 'a': 2}", "key 'a' is there twice"),
        ("a: 0100", "0100 is a number in octal"),
        ("a: [-0_7]", "-0_7 is a number in octal"),
        ("a: 10:00", "10:00 is a number in base 60"),
        ("a: 1:30:00.5", "1:30:00.5 is a number in base 60"),
        ("a: &x [*x]", "an alias that holds itself"),
        ("a: {b: &x {c: *x}}", "an alias that holds itself"),
        ("[" * 3000, f"nested more than {DEEPEST} deep"),
        ("a: 2024-13-45", "not valid YAML"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: \x01", "not valid YAML"),
        ("? [1]\n: 2", "unhashable key"),
        ("---\na: 1\n---\nb: 2", "another|single document"),
        ("\ta: 1", "cannot start any token"),
    ],
)
def test_yaml_that_says_other_than_it_looks_is_refused(text, message):
    with pytest.raises(UserError, match=f"^w: not valid YAML .*{message}|^w: {message}"):
        parse_yaml(text, "w")


def test_aliases_that_unfold_without_end_are_refused():
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for name, before in zip("bcdefghi", "abcdefgh", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for read in (parse_yaml, parse_yaml_documents):
        with pytest.raises(UserError, match="more than 100,000 values"):
            read(bomb, "w")


def test_plain_yaml_stays_what_it_was():
    text = "a: '0100'\nb: 0\nc: 0.5\nd: 1_000\ne: [0x10, -3]\nf: &x {g: 1}\nh: {<<: *x, i: 2}\nj: '10:00'\nk: 08x"
    assert parse_yaml(text, "w") == {
        "a": "0100",
        "b": 0,
        "c": 0.5,
        "d": 1000,
        "e": [16, -3],
        "f": {"g": 1},
        "h": {"g": 1, "i": 2},
        "j": "10:00",
        "k": "08x",
    }


def test_yaml_of_others_keeps_its_octals():
    assert parse_yaml_documents("defaultMode: 0400\n---\nb: 1", "w") == [{"defaultMode": 256}, {"b": 1}]
    with pytest.raises(UserError, match="key 'a' is there twice"):
        parse_yaml_documents("a: 1\na: 2", "w")


@pytest.mark.parametrize("read", [read_text, read_json, read_yaml])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, read):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in (
        (tmp_path / "gone", "no such file"),
        (tmp_path, "a folder, where a file is expected"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (tmp_path / "a\0b", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read(path)


@pytest.mark.parametrize("text", ["", "a,a\n1,2", "a,\n1,2", '"a'])
def test_a_csv_without_columns_is_refused(text):
    with pytest.raises(UserError, match=r"^f"):
        parse_csv(text, "f")
