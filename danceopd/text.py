"""The one reader for text that people write: JSON, JSON Lines, CSV and YAML.

UTF-8 with or without a byte-order mark, and any line end, are taken; any other encoding is refused with its name and
line. A line of JSON ends where a line ends in JSON's own terms: U+2028, U+2029 and U+0085 are text inside a string.
What would be lost or changed without a word is refused: a key that is there twice, numbers that YAML 1.1 reads
otherwise than they look (`0100` is 64 there, `10:00` is 600), and text that no UTF-8 file can hold.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from danceopd.errors import UserError

_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
MOST_NODES = 100_000  # of a YAML document with its aliases written out
DEEPEST = 100  # of values in values; what reads them later goes down by recursion
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
# What PyYAML's constructors raise for a value that does not fit its tag (`!!int x`, the 45th of a month).
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


def read_text(path: Path, what: str = "") -> str:
    """A whole text file.

    Args:
        path: of the file.
        what: it is called in messages; default: its path.

    Raises:
        UserError: if it is missing, cannot be read, or is no UTF-8.
    """
    return decode(read_bytes(path, what), what or str(path))


def read_bytes(path: Path, what: str = "") -> bytes:
    """A whole file.

    Raises:
        UserError: if it is missing or cannot be read.
    """
    what = what or str(path)
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{what}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{what}: a folder, where a file is expected") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{what}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def decode(data: bytes, where: str) -> str:
    """The text in bytes, without its byte-order mark.

    Raises:
        UserError: naming `where`, the line, and the encoding it seems to be in.
    """
    _refuse_marked(data, where)
    data = data.removeprefix(codecs.BOM_UTF8)
    if (nul := data.find(b"\0")) >= 0:
        line = data[:nul].count(b"\n") + 1
        raise UserError(f"{where}, line {line}: holds a NUL byte: UTF-16 without a mark, or no text; save it as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(data, error.start, where) from error


def _refuse_marked(data: bytes, where: str) -> None:
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise UserError(f"{where}, line 1: {name}, not UTF-8; save the file as UTF-8")


def _not_utf8(data: bytes, start: int, where: str) -> UserError:
    before = data[:start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    line, byte = before.count(b"\n") + 1, data[start]
    return UserError(
        f"{where}, line {line}: not UTF-8 (byte 0x{byte:02X}; Latin-1 or Windows-1252?); save the file as UTF-8"
    )


# ---------------------------------------------------------------------------------------------------------------- JSON


def parse_json(text: str, where: str) -> Any:
    """The value in JSON text.

    Raises:
        UserError: naming `where`, if it is no JSON, nested too deep, has a key twice or holds half a character.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
            raise RecursionError
        if "\\u" in text:  # an escape can write what no encoding can
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a character (a lone surrogate); write it anew") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON (nested more than {DEEPEST} deep)") from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    return value


def _depth(value: Any) -> int:
    """How many lists and objects lie in one another at most."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name!r} is there twice")
            seen.add(name)
    return found


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: if the file is missing, cannot be read, or is no JSON.
    """
    return parse_json(read_text(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: if it cannot be read, is no UTF-8, no JSON, or something else than an object.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: no JSON object; copy the file anew")
    return found


def check_json_files(folder: Path) -> None:
    """Whether a checkpoint's JSON files, in its folder and in those of its parts, are as the libraries read them.

    Raises:
        UserError: naming the first that is not UTF-8, or begins with a byte-order mark.
    """
    for path in sorted((*folder.glob("*.json"), *folder.glob("*/*.json"))):
        data = read_bytes(path)
        decode(data, str(path))
        if data.startswith(codecs.BOM_UTF8):
            raise UserError(f"{path}, line 1: begins with a byte-order mark; save the file as UTF-8 without one")


def json_lines(lines: Iterable[bytes], where: str) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
    """The objects of JSON Lines, a line in memory at a time; a bad line costs that line.

    Args:
        lines: an open binary file, or pieces that end at line feeds.
        where: it is called in messages.

    Yields:
        Each line's number, from 1, and its object, or what is wrong with it. Blank lines are passed over.

    Raises:
        UserError: if the whole file is in another encoding.
    """
    for number, line in enumerate(_split(lines, where), start=1):
        if line.strip():
            here = f"{where}, line {number}"
            try:
                value = parse_json(_decode_line(line, here), here)
                if not isinstance(value, dict):
                    raise UserError(f'{here}: not a JSON object; write {{"prompt": ...}}')
                yield number, value
            except UserError as error:
                yield number, error


def _split(lines: Iterable[bytes], where: str) -> Iterator[bytes]:
    first = True
    for piece in lines:
        if first:
            _refuse_marked(piece, where)
            piece, first = piece.removeprefix(codecs.BOM_UTF8), False
        yield from piece.removesuffix(b"\n").removesuffix(b"\r").split(b"\r")


def _decode_line(line: bytes, here: str) -> str:
    try:
        return decode(line, here)
    except UserError as error:  # the line is in `here` already
        raise UserError(str(error).replace(f"{here}, line 1:", f"{here}:")) from error


# ----------------------------------------------------------------------------------------------------------------- CSV


def parse_csv(text: str, where: str) -> tuple[list[str], Iterator[tuple[int, dict[str, str] | UserError]]]:
    """The column names of CSV text, and its rows; a row of too many or too few cells costs that row.

    Returns:
        The names, and an iterator of each row's last line number and its cells, or what is wrong with it.

    Raises:
        UserError: if there is no first line, or it has a name twice or an empty one.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"{where}, line 1: not CSV ({error})") from error
    if not names:
        raise UserError(f"{where}: empty; the first line names the columns")
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{where}, line 1: a column without a name, or a name twice: {', '.join(names)}")
    return names, _csv_rows(reader, names, where)


def _csv_rows(reader: Any, names: list[str], where: str) -> Iterator[tuple[int, dict[str, str] | UserError]]:
    try:
        for cells in reader:
            if not cells:
                continue
            if len(cells) == len(names):
                yield reader.line_num, dict(zip(names, cells, strict=True))
            else:
                said = f"{len(cells)} cells, the first line names {len(names)}"
                yield reader.line_num, UserError(f"{where}, line {reader.line_num}: {said}")
    except csv.Error as error:
        yield reader.line_num, UserError(f"{where}, line {reader.line_num}: not CSV ({error})")


# ---------------------------------------------------------------------------------------------------------------- YAML


class _OnceLoader(yaml.SafeLoader):
    """Safe YAML without a key twice, a cycle, or aliases that unfold without end."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _size(node, {}, DEEPEST)
        return node

    def get_node(self) -> yaml.Node | None:
        node = super().get_node()
        if node is not None:
            _size(node, {}, DEEPEST)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if isinstance(node, yaml.MappingNode):
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                name = (key.tag, str(key.value))
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge" and name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(name)
        return super().construct_mapping(node, deep)


class _PlainLoader(_OnceLoader):
    """As people read it: a number that YAML 1.1 reads otherwise than it looks is refused."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
            for pattern, what in ((_OCTAL, "octal"), (_SEXAGESIMAL, "base 60")):
                if pattern.fullmatch(node.value):
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"{node.value} is a number in {what} here; write it plainly, or in quotes if it is text",
                        node.start_mark,
                    )
        return super().construct_scalar(node)


def _size(node: yaml.Node, known: dict[int, int | None], deeper: int) -> int:
    """Nodes below a node with every alias written out.

    Raises:
        yaml.YAMLError: if they are without end, or more than `MOST_NODES`.
        RecursionError: if they go more than `deeper` deep.
    """
    if not deeper:
        raise RecursionError
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise yaml.composer.ComposerError(None, None, "an alias that holds itself", node.start_mark)
        return size
    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_size(child, known, deeper - 1) for child in children)
    if size > MOST_NODES:
        raise yaml.composer.ComposerError(
            None, None, f"more than {MOST_NODES:,} values with its aliases written out", node.start_mark
        )
    known[id(node)] = size
    return size


def parse_yaml(text: str, where: str) -> Any:
    """The value in YAML text that a person writes: a recipe, a study, settings, the value of `--set`.

    Raises:
        UserError: naming `where`, if it is no YAML, has a key twice, or a number that is not what it looks like.
    """
    try:
        return yaml.load(text, _PlainLoader)  # a SafeLoader
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML (nested more than {DEEPEST} deep)") from error
    except _YAML_ERRORS as error:
        raise _no_yaml(where, error) from error


def parse_yaml_documents(text: str, where: str) -> list[Any]:
    """The documents in YAML of others' making (Kubernetes, KFP, DVC), whose numbers are YAML 1.1's.

    Raises:
        UserError: naming `where`, if it is no YAML, or has a key twice.
    """
    try:
        return list(yaml.load_all(text, _OnceLoader))  # a SafeLoader
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML (nested more than {DEEPEST} deep)") from error
    except _YAML_ERRORS as error:
        raise _no_yaml(where, error) from error


def _no_yaml(where: str, error: Exception) -> UserError:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        said = f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(error.problem.split())}"
    else:
        said = " ".join(str(error).replace('in "<unicode string>", ', "").split())
    return UserError(f"{where}: not valid YAML ({said})")


def read_yaml(path: Path, what: str = "") -> Any:
    """The value in a YAML file that a person writes (see `parse_yaml`)."""
    return parse_yaml(read_text(path, what), what or str(path))
