"""Public benchmarks' prompts and source pictures as records, each from the files its authors give out.

The records are evaluation sets: split `test`, no targets, with the benchmark's own kind of task in the provenance, so
that figures can be told by kind. What a benchmark scores with is another matter: GenEval's object detector is not here,
CLIP and the judge take its place; GEdit-Bench's and ImgEdit's questions are asked in this project's words.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from danceopd.data.assemble import assemble
from danceopd.data.records import Record
from danceopd.errors import UserError, unknown_name
from danceopd.text import json_lines, read_bytes, read_json

GENEVAL_FILE, IMGEDIT_FILES = "evaluation_metadata.jsonl", ("basic_edit.json", "singleturn.json", "UGE_edit.json")
_GEDIT_COLUMNS = ("task_type", "key", "instruction", "instruction_language", "input_image")
_ROWS = 16  # in memory at once


@dataclass(frozen=True)
class Asked:
    """What is to be imported.

    Attributes:
        source: the benchmark's file or folder.
        task: the task its records get.
        images: folder of the source pictures, where they lie apart.
        language: of the instructions, where there are several.
    """

    source: Path
    task: str
    images: Path | None = None
    language: str = "en"


def import_benchmark(name: str, asked: Asked, out: Path) -> dict:
    """Write a benchmark as a dataset folder and return its manifest.

    Raises:
        UserError: if the benchmark is unknown, or a file, row or picture of it is not as it should be.
    """
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    return assemble(BENCHMARKS[name](asked), out)


def _record(name: str, asked: Asked, key: str, prompt: str, source: bytes | None, facts: dict[str, Any]) -> Record:
    provenance = json.dumps({"benchmark": name, **facts}, sort_keys=True, ensure_ascii=False)
    return Record(f"{name}-{key}", asked.task, prompt, source, None, "test", provenance)


def _text(row: dict, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: '{name}' is {json.dumps(value, default=str)[:60]}; it must be text")
    return value.strip()


def _found(source: Path, names: tuple[str, ...], what: str) -> Path:
    """The file itself, or the one of a known name in a folder."""
    if source.is_file():
        return source
    there = [path for name in names for path in (source / name, source / "prompts" / name) if path.is_file()]
    if not there:
        state = "holds no" if source.is_dir() else "is not there, nor a folder with"
        raise UserError(f"{source}: {state} {' or '.join(names)}; give {what}")
    return there[0]


# ------------------------------------------------------------------------------------------------------------- GenEval


def read_geneval(asked: Asked) -> Iterator[Record]:
    """GenEval (Ghosh et al., 2023): one line per prompt, `{"tag", "include", "exclude"?, "prompt"}`."""
    path = _found(asked.source, (GENEVAL_FILE,), "GenEval's prompts/evaluation_metadata.jsonl")
    for number, (line, row) in enumerate(json_lines(io.BytesIO(read_bytes(path)), str(path))):
        where = f"{path}, line {line}"
        if isinstance(row, UserError):
            raise row
        facts: dict[str, Any] = {"kind": _text(row, "tag", where)}
        for name in ("include", "exclude"):
            if name in row or name == "include":
                facts[name] = _objects(row.get(name), name, where)
        yield _record("geneval", asked, f"{number:05d}", _text(row, "prompt", where), None, facts)


def _objects(value: Any, name: str, where: str) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(o, dict) and isinstance(o.get("class"), str) for o in value):
        raise UserError(f"{where}: '{name}' must be a list of objects with a 'class'")
    return value


# --------------------------------------------------------------------------------------------------------- GEdit-Bench


def read_gedit(asked: Asked) -> Iterator[Record]:
    """GEdit-Bench (arXiv 2504.17761) as on the hub: Arrow files as `save_to_disk` writes them, or Parquet.

    One row per instruction and language: `task_type`, `key`, `instruction`, `instruction_language`, `input_image`.
    """
    files = (
        [asked.source]
        if asked.source.is_file()
        else sorted(path for path in asked.source.rglob("*") if path.suffix.lower() in (".parquet", ".arrow"))
    )
    if not files:
        raise UserError(f"{asked.source}: no .parquet or .arrow files there; give the folder of GEdit-Bench")
    languages, kept = set(), False
    for path in files:
        for number, row in enumerate(_rows(path)):
            where = f"{path}, row {number}"
            language = _text(row, "instruction_language", where)
            languages.add(language)
            if language != asked.language:
                continue
            kept = True
            key, facts = _text(row, "key", where), {"kind": _text(row, "task_type", where), "language": language}
            if isinstance(row.get("Intersection_exist"), bool):
                facts["intersection"] = row["Intersection_exist"]
            image = row["input_image"]
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes) or not data:
                raise UserError(f"{where}: 'input_image' holds no picture's bytes; fetch the file again")
            yield _record("gedit", asked, f"{language}-{key}", _text(row, "instruction", where), data, facts)
    if not kept:
        raise UserError(
            f"{asked.source}: no instruction in language {asked.language!r}; there are: "
            f"{', '.join(sorted(languages)) or 'no rows'}"
        )


def _rows(path: Path) -> Iterator[dict]:
    """A file's rows, the columns that are wanted, a few in memory at a time."""
    try:
        if path.suffix.lower() == ".parquet":
            file = pq.ParquetFile(path)
            wanted = _columns(path, file.schema_arrow.names)
            batches: Iterator[pa.RecordBatch] = file.iter_batches(batch_size=_ROWS, columns=wanted)
        else:
            batches = _arrow_batches(path)
        for batch in batches:
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a readable Parquet or Arrow file ({text}); fetch it again") from error


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as reader:
        wanted = _columns(path, reader.schema.names)
        for batch in reader:
            for start in range(0, batch.num_rows, _ROWS):
                yield batch.select(wanted).slice(start, _ROWS)


def _columns(path: Path, there: list[str]) -> list[str]:
    missing = [name for name in _GEDIT_COLUMNS if name not in there]
    if missing:
        raise UserError(f"{path}: column(s) missing: {', '.join(missing)}; found {', '.join(there)}")
    return [*_GEDIT_COLUMNS, *(["Intersection_exist"] if "Intersection_exist" in there else [])]


# ------------------------------------------------------------------------------------------------------------- ImgEdit


def read_imgedit(asked: Asked) -> Iterator[Record]:
    """ImgEdit-Bench (arXiv 2505.20275): a JSON object of `{key: {"id", "prompt", "edit_type"?}}`, `id` naming a
    picture."""
    path = _found(asked.source, IMGEDIT_FILES, "ImgEdit-Bench's JSON file (basic_edit.json)")
    rows, root = read_json(path), asked.images or path.parent
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"{path}: must be a JSON object with an entry an edit, as basic_edit.json is")
    for key, row in rows.items():
        where = f"{path}, entry {key!r}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be an object with 'id' and 'prompt'")
        name = _text(row, "id", where)
        facts = {"key": key, "picture": name}
        if "edit_type" in row:
            facts["kind"] = _text(row, "edit_type", where)
        yield _record("imgedit", asked, key, _text(row, "prompt", where), _picture(root, name, where), facts)


def _picture(root: Path, name: str, where: str) -> bytes:
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            raise UserError(f"{where}: 'id' leads out of {root} ({name}); fetch the file again")
        return path.read_bytes()
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: picture {name} is not in {root}; name the pictures' folder with --images") from error


BENCHMARKS: dict[str, Callable[[Asked], Iterator[Record]]] = {
    "geneval": read_geneval,
    "gedit": read_gedit,
    "imgedit": read_imgedit,
}
