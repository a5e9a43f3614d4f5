"""One row of a data set into one record, or the reason why not.

Every refusal has a short name; `REASONS` says what each means. They are counted and listed, and the import goes on:
a set of a million rows always holds some that are damaged.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import posixpath
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from danceopd.data.buckets import bucket_sizes, check_shape, cover, nearest_bucket, same_shape
from danceopd.data.dedup import BITS, picture_hash
from danceopd.data.importers.inputs import MOST_BYTES, NO_KIND, InputFile, RawRow, plain
from danceopd.data.importers.spec import Buckets, FixedSize, ImportSpec
from danceopd.data.pictures import Picture, Refused, read_picture
from danceopd.data.records import UNDECIDED, Record
from danceopd.errors import UserError

REASONS = {
    "line-not-json": "a line of a metadata file, or a .json beside a picture or in a tar, is no JSON object in UTF-8",
    "row-unreadable": "what the row holds cannot be made a record of",
    "rows-damaged": "rows of a Parquet file whose bytes are damaged",
    "field-repeated": "a sample in a tar holds one field twice",
    "caption-unreadable": "the file with the caption cannot be read",
    "file-too-large": "a file inside a tar is too large to be a picture or a caption",
    "id-missing": "the data set numbers its rows and this one has no id",
    "id-repeated": "another row of this import has the same id",
    "prompt-missing": "no instruction or caption",
    "prompt-blank": "the instruction is spaces only",
    "prompt-not-text": "the instruction is no text",
    "prompt-not-utf8": "the instruction was written in another encoding: it holds bytes that are no UTF-8",
    "prompt-control": "the instruction holds control characters",
    "prompt-too-long": "the instruction is longer than max_prompt",
    "score-not-a-number": "a score that min_scores or max_scores asks for is missing or no number",
    "source-missing": "an edit without the picture to edit",
    "target-missing": "no wanted picture",
    "several-pictures": "a list of pictures where one is taken",
    "picture-wrong-type": "the column holds neither picture bytes nor a path",
    "picture-not-there": "the path leads to no file",
    "picture-unreadable": "the picture's file cannot be read, or its name is none",
    "picture-outside": "the path leads out of the data set's folder",
    "picture-empty": "the picture has no bytes",
    "picture-unknown-format": "the bytes are no picture format that is decoded",
    "picture-truncated": "the picture's bytes end too early",
    "picture-damaged": "the picture cannot be decoded",
    "picture-too-large": "more pixels than max_pixels (a decompression bomb)",
    "picture-too-small": "the shorter side is below min_side",
    "picture-too-narrow": "longer and thinner than max_ratio",
    "picture-animated": "more than one frame",
    "picture-invisible": "transparent everywhere",
    "picture-float": "floating-point pixels without a range",
    "picture-depth": "more than 16 bits per channel",
    "split-between": "one of its pictures lies in one split and one in another",
    "pair-shapes-differ": "source and target have different ratios: no crop aligns them",
    "pair-unchanged": "source and target are the same picture",
}
# A file's own trouble, which stays when the import is run again; a disk's or a network's may go.
_OF_THE_FILE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EILSEQ)
Fate = Literal["kept", "refused", "unmapped", "left out", "score"]


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Attributes:
        row: which.
        fate: "kept", or why not.
        label: of a row not kept: reason, kind of edit or score column.
        message: of a row not kept, for the list of examples.
        record: of a kept row.
        hashes: perceptual hashes of its pictures.
    """

    row: RawRow
    fate: Fate
    label: str = ""
    message: str = ""
    record: Record | None = None
    hashes: tuple[int, ...] = ()


def kind_of(row: RawRow) -> str:
    """The kind of edit that a row names."""
    return str(row.values["kind"] or NO_KIND).strip()


def convert(row: RawRow, spec: ImportSpec, file: InputFile) -> Outcome:
    """Make a record of a row. Cheap checks come first; pictures are decoded once."""
    try:
        if row.broken is not None:
            raise row.broken
        kind = kind_of(row)
        task = spec.task_of(kind)
        if task is None:
            decided = spec.has_rule(kind)
            message = f"{row.where}: kind of edit {kind!r} " + ("is left out" if decided else "has no task")
            return Outcome(row, "left out" if decided else "unmapped", kind, message)
        for name in spec.scores:
            low, high = spec.min_scores.get(name, -math.inf), spec.max_scores.get(name, math.inf)
            if not low <= (score := _score(row, name)) <= high:
                return Outcome(row, "score", name, f"{row.where}: {name} is {score:g}, wanted {low:g} to {high:g}")
        return _record(row, spec, file, kind, task)
    except Refused as refused:
        return Outcome(row, "refused", refused.reason, str(refused))
    except UserError:
        raise
    except Exception as error:  # whatever a row holds, it costs that row
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Outcome(row, "refused", "row-unreadable", f"{row.where}: cannot be made a record of ({said})")


def _score(row: RawRow, name: str) -> float:
    value = row.values["carried"].get(name)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Refused("score-not-a-number", f"{row.where}: score '{name}' is {value!r}; a number is needed there")
    return number


def _record(row: RawRow, spec: ImportSpec, file: InputFile, kind: str, task: str) -> Outcome:
    prompt = _prompt(row, spec)
    named = _id(row, spec)
    data = {}
    for role in ("source", "target"):
        if row.values[role] is None and role == "source" and not spec.form.pairs:
            continue
        data[role] = _bytes(row.values[role], row, role, spec, file)
    pictures = {
        role: read_picture(found, f"{row.where}, {role}", spec.matte, spec.max_pixels) for role, found in data.items()
    }
    for role, picture in pictures.items():
        check_shape(picture.size, spec.min_side, spec.max_ratio, f"{row.where}, {role}")
    _check_pair(row, pictures, spec)
    size = _size(pictures["source" if "source" in pictures else "target"].size, spec)
    encoded = {role: _encode(picture, size, data[role], spec) for role, picture in pictures.items()}
    hashes = tuple(picture_hash(picture.image) for picture in pictures.values())
    name = named or _content_id(prompt, data)
    facts = {
        "dataset": spec.form.about,
        "file": file.name,
        "row": row.number,
        "edit_type": kind,
        "license": row.values["carried"].get("license") or row.values["carried"].get("licence") or spec.license,
        "bucket": f"{size[0]}x{size[1]}",
        "size": {role: list(picture.size) for role, picture in pictures.items()},
        "hash": [f"{value:0{BITS // 4}x}" for value in hashes],
    } | {k: v for k, v in row.values["carried"].items() if k not in ("license", "licence")}
    record = Record(
        id=f"{spec.label}-{name}",
        task=task,
        prompt=prompt,
        source=encoded.get("source"),
        target=encoded["target"],
        split=UNDECIDED,  # by the records before it: see `danceopd.data.splits`
        provenance=json.dumps(facts, sort_keys=True, default=str),
    )
    return Outcome(row, "kept", record=record, hashes=hashes)


# ---------------------------------------------------------------------------------------------------------------- text


def _id(row: RawRow, spec: ImportSpec) -> str | None:
    """The row's own id; None where the data set has none."""
    value = row.values["id"]
    text = "" if value is None else str(value).strip()
    if not text and spec.form.numbered:
        raise Refused("id-missing", f"{row.where}: has no id ({spec.column('id')[0]}); the file is damaged there")
    return text or None


def _content_id(prompt: str, data: dict[str, bytes]) -> str:
    parts = [prompt.encode(), *data.values()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:20]


def _prompt(row: RawRow, spec: ImportSpec) -> str:
    value = row.values["prompt"]
    if isinstance(value, list):
        texts = [text for text in value if text is not None]
        choose = {
            "first": lambda t: t[0],
            "last": lambda t: t[-1],
            "longest": lambda t: max(t, key=lambda x: len(str(x))),
        }
        value = choose[spec.choose_prompt](texts) if texts else None
    if value is None:
        raise Refused("prompt-missing", f"{row.where}: has no prompt; every record needs one")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Refused("prompt-not-utf8", f"{row.where}: the prompt is no UTF-8 text; convert it") from error
    if not isinstance(value, str):
        raise Refused("prompt-not-text", f"{row.where}: the prompt is {type(value).__name__}, not text")
    if "\ufffd" in value:
        raise Refused("prompt-not-utf8", f"{row.where}: the prompt holds characters that were lost in a conversion")
    text = " ".join(value.split())
    if not text:
        raise Refused("prompt-blank", f"{row.where}: the prompt is blank; every record needs text there")
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise Refused("prompt-control", f"{row.where}: the prompt holds control characters; clean it")
    if len(text) > spec.max_prompt:
        raise Refused(
            "prompt-too-long", f"{row.where}: the prompt has {len(text)} characters; at most {spec.max_prompt}"
        )
    return text


# ------------------------------------------------------------------------------------------------------------ pictures


def _bytes(value: Any, row: RawRow, role: str, spec: ImportSpec, file: InputFile) -> bytes:
    where = f"{row.where}, {role}"
    if isinstance(value, list):
        if len(value) > 1:
            raise Refused("several-pictures", f"{where}: has {len(value)} pictures; one is taken")
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise Refused(f"{role}-missing", f"{where}: is missing; the row needs that picture")
    if isinstance(value, str):
        return _fetch(value, where, spec, file)
    if not isinstance(value, bytes):
        raise Refused("picture-wrong-type", f"{where}: is {type(value).__name__}; picture bytes or a path are expected")
    return value


def _fetch(name: str, where: str, spec: ImportSpec, file: InputFile) -> bytes:
    """A picture that a row names by its path below the data set's folder."""
    path = posixpath.normpath(name)
    if name.startswith("/") or path.split("/")[0] == ".." or "://" in name:
        raise Refused("picture-outside", f"{where}: {name} leads out of the data set's folder")
    home = file.path if spec.form.reads == "folder" else posixpath.dirname(file.path)
    system = file.system
    if spec.images is not None:
        system, home = _system(spec.images)
    full = f"{home.rstrip('/')}/{path}"
    try:
        if system.size(full) > MOST_BYTES:
            raise Refused("file-too-large", f"{where}: {name} has more than {MOST_BYTES} bytes")
        return system.cat_file(full)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise Refused("picture-not-there", f"{where}: {plain(name)} is not in {plain(home)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or error
        if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
            raise UserError(f"{where}: {plain(name)} cannot be read ({said}); mend that and go on") from error
        raise Refused("picture-unreadable", f"{where}: {plain(name)[:100]} cannot be read ({said})") from error


def _system(location: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(location)


def _check_pair(row: RawRow, pictures: dict[str, Picture], spec: ImportSpec) -> None:
    if "source" not in pictures:
        return
    source, target = pictures["source"], pictures["target"]
    if not same_shape(source.size, target.size, spec.tolerance):
        raise Refused(
            "pair-shapes-differ",
            f"{row.where}: source is {source.size} and target {target.size} (H, W); nothing aligns them",
        )
    if source.size == target.size and source.image.tobytes() == target.image.tobytes():
        raise Refused("pair-unchanged", f"{row.where}: source and target are the same picture; it teaches nothing")


def _size(size: tuple[int, int], spec: ImportSpec) -> tuple[int, int]:
    """What a pair of this (height, width) becomes."""
    if isinstance(spec.resize, FixedSize):
        return spec.resize.height, spec.resize.width
    if isinstance(spec.resize, Buckets):
        return nearest_bucket(size, bucket_sizes(spec.resize.area, spec.resize.step, spec.resize.max_ratio))
    return size


def _encode(picture: Picture, size: tuple[int, int], data: bytes, spec: ImportSpec) -> bytes:
    """The picture's bytes at `size`; its own bytes where nothing was changed."""
    if picture.size == size and not picture.changed:
        return data
    image: Image.Image = cover(picture.image, size)
    out = io.BytesIO()
    if spec.encode == "jpeg":
        image.save(out, "JPEG", quality=spec.jpeg_quality, subsampling=0)
    else:
        image.save(out, "PNG", compress_level=1)
    return out.getvalue()
