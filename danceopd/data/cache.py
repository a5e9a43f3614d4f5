"""A cache of encodings that many workers fill and many runs share: a plain folder of safetensors shards.

    <cache>/index.json                         shards, their keys and sizes
    <cache>/pictures-<group>/<keys>.safetensors   latents, one row per picture
    <cache>/prompts-<group>/<keys>.safetensors    prompt embeddings, one row per prompt

A group names the encoder and the resolution, a key the content (SHA-256 of the prompt or of the picture's bytes); so a
grown dataset, another recipe and another machine find what fits them and add what is missing. A shard appears whole, by
rename: a worker that was killed loses the shard it was at. Rows are float32, or bfloat16 where that loses nothing.
Put the folder under DVC or copy it to an object store as it is; a recipe's `cache` may be such a URI.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from danceopd.backbones.base import Backbone
from danceopd.data.encoded import (
    EncodedRecords,
    Prompt,
    Rows,
    Sizing,
    check_size,
    encode_in_batches,
    picture_batch,
    picture_encoder,
    prompt_batch,
    prompt_encoder,
    prompt_of,
    tell_cut,
)
from danceopd.data.records import Record
from danceopd.errors import UserError
from danceopd.files import content_key, read_json, write_json

log = logging.getLogger(__name__)
INDEX = "index.json"
SHARD_BYTES = 1 << 27
MOST_ROWS = 1024
TELL_EVERY = 30.0  # seconds


def key_of(content: str | bytes) -> str:
    """The name of a prompt or a picture's bytes."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:32]


def prompt_key(prompt: Prompt) -> str:
    """The name of a prompt, and of the source image it has seen."""
    text, source = prompt
    return key_of(text) if source is None else key_of(f"{key_of(text)} {key_of(source)}")


@dataclass
class CachedRows(Rows):
    """Rows that lie in a cache and are read when they are asked for.

    Attributes:
        places: file and row in it of each of the N rows.
    """

    places: list[tuple[Path, int]]
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def row(self, number: int) -> Tensor:
        """One row, float32."""
        path, row = self.places[number]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").get_slice("rows")
        return self._open[path][row].float()


class EncodingCache:
    """The folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def places(self, group: str) -> dict[str, tuple[Path, int]]:
        """Where each key of a group lies.

        Raises:
            UserError: if a shard is damaged.
        """
        return {key: (path, row) for path, keys in self._shards(group) for row, key in enumerate(keys)}

    def _shards(self, group: str) -> Iterator[tuple[Path, list[str]]]:
        index = read_json(self.folder / INDEX) if (self.folder / INDEX).is_file() else {}
        for path in sorted((self.folder / group).glob("*.safetensors")):
            known = index.get(f"{group}/{path.name}")
            if known is None:
                yield path, self._keys(path)
            elif known["bytes"] == path.stat().st_size:
                yield path, known["keys"]
            else:
                raise _damaged(path, f"{path.stat().st_size} bytes, the index says {known['bytes']}")

    @staticmethod
    def _keys(path: Path) -> list[str]:
        try:
            with safe_open(path, framework="pt") as file:
                return json.loads(file.metadata()["keys"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, str(error)) from error

    def write(self, group: str, keys: list[str], rows: Tensor) -> Path:
        """Add one shard: rows (n, ...) float32 with their keys."""
        folder = self.folder / group
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{content_key(keys)}.safetensors"
        scratch = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
        save_file({"rows": _narrow(rows).contiguous()}, scratch, metadata={"keys": json.dumps(keys)})
        scratch.replace(path)
        return path

    def write_index(self) -> dict[str, int]:
        """Write `index.json` anew from the shards; returns the number of rows by group."""
        found: dict[str, dict] = {}
        rows: dict[str, int] = {}
        for folder in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            for path, keys in self._shards(folder.name):
                found[f"{folder.name}/{path.name}"] = {"keys": keys, "bytes": path.stat().st_size}
                rows[folder.name] = rows.get(folder.name, 0) + len(keys)
        write_json(self.folder / INDEX, found)
        return rows


def strangers(folder: Path) -> list[str] | None:
    """What a cache's folder holds beside the cache; None if it holds none. See `danceopd.files.check_output`."""
    names = [path.name for path in folder.iterdir()]
    own = [name for name in names if name == INDEX or name.startswith(("pictures-", "prompts-"))]
    return sorted(set(names) - set(own)) if own else None


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: damaged ({' '.join(why.split())}); delete it, and what it held is encoded again")


def _narrow(rows: Tensor) -> Tensor:
    """The same values in half the bytes, if bfloat16 holds them exactly (a text encoder in bfloat16 gives such)."""
    half = rows.bfloat16()
    return half if torch.equal(half.float(), rows) else rows


def fetch_cache(location: str, workspace: Path) -> Path:
    """The cache's folder here; shards of one in an object store are downloaded unless they are there already.

    Raises:
        UserError: if the store cannot be read.
    """
    if "://" not in location:
        return Path(location)
    import fsspec

    folder = Path(workspace) / "downloads" / f"cache-{content_key(location)}"
    try:
        system, root = fsspec.core.url_to_fs(location)
        root = root.rstrip("/")
        for name, facts in sorted(system.find(root, detail=True).items()):
            path = folder / name[len(root) :].lstrip("/")
            if path.name == INDEX or not path.is_file() or path.stat().st_size != facts["size"]:
                path.parent.mkdir(parents=True, exist_ok=True)
                scratch = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
                system.get_file(name, str(scratch))
                scratch.replace(path)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"cache {location!r}: cannot be read ({error}); check the URI, credentials and network"
        ) from error
    return folder


@dataclass(frozen=True)
class Wanted:
    """What a set of records needs, in the order it is met; the pictures themselves are not kept.

    Attributes:
        tasks: of each record.
        prompts: key -> prompt.
        pictures: key of each source and target -> (height, width) at which it is encoded.
        sizes: (height, width) of each record.
        prompt_row: each record's row in `prompts`; `source_row` and `target_row` in `pictures`, or -1.
    """

    tasks: list[str]
    prompts: dict[str, str]
    pictures: dict[str, tuple[int, int]]
    sizes: list[tuple[int, int]]
    prompt_row: list[int]
    source_row: list[int]
    target_row: list[int]

    def pictures_by_size(self) -> dict[tuple[int, int], list[str]]:
        """Keys of the pictures of each size."""
        found: dict[tuple[int, int], list[str]] = {}
        for key, size in self.pictures.items():
            found.setdefault(size, []).append(key)
        return found


def wanted_by(backbone: Backbone, records: Iterable[Record], targets: bool, sizing: Sizing) -> Wanted:
    """Read records once and note what they need encoded.

    Raises:
        UserError: if a record's own size does not suit the back end.
    """
    found = Wanted([], {}, {}, [], [], [], [])
    rows: dict[str, int] = {}
    places: dict[str, int] = {}
    fitting: set[tuple[int, int]] = set()
    for record in records:
        size = sizing.of_record(record)
        if sizing.own and size not in fitting:
            check_size(backbone, size, record)
            fitting.add(size)
        found.sizes.append(size)
        key = prompt_key(prompt_of(record, backbone.prompt_sees_source))
        found.prompts.setdefault(key, record.prompt)
        found.tasks.append(record.task)
        found.prompt_row.append(rows.setdefault(key, len(rows)))
        for picture, where in (
            (record.source, found.source_row),
            (record.target if targets else None, found.target_row),
        ):
            if picture is None:
                where.append(-1)
                continue
            key = key_of(picture)
            found.pictures.setdefault(key, sizing.of(picture, f"record {record.id!r}"))
            where.append(places.setdefault(key, len(places)))
    return found


def _seen_prompts(records: Iterable[Record]) -> Iterator[tuple[str, Prompt]]:
    for record in records:
        prompt = prompt_of(record, True)
        yield prompt_key(prompt), prompt


def _pictures(records: Iterable[Record], targets: bool) -> Iterator[tuple[str, tuple[bytes, str]]]:
    for record in records:
        for name in ("source", "target") if targets else ("source",):
            data = getattr(record, name)
            if data is not None:
                yield key_of(data), (data, f"record {record.id!r}, {name}")


def encode_cached(
    backbone: Backbone,
    stream: Callable[[], Iterable[Record]],
    sizing: Sizing,
    cache: EncodingCache,
    base_key: str,
    targets: bool,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> EncodedRecords:
    """Encode records through a cache: what it lacks is encoded and added, by all workers together.

    The result equals `encode_records` of the same records to the bit; rows stay on disk until they are asked for.

    Args:
        backbone: the model family whose encoders are used; not called if nothing is missing.
        stream: gives the records anew each time, in one order; no more than some shards' pictures are kept.
        sizing: of the pictures; must suit the back end.
        cache: where encodings lie.
        base_key: identity of the base (its encoders).
        targets: whether target images are encoded too.
        share: this worker's number and how many there are.
        wait: returns once every worker is done.

    Raises:
        UserError: if there are no records, a picture cannot be read, or a shard is damaged.
    """
    wanted = wanted_by(backbone, stream(), targets, sizing)
    if not wanted.tasks:
        raise UserError("no records to encode; check the recipe's tasks against the dataset's splits")
    texts, sources = list(wanted.prompts.values()), dict(zip(wanted.prompt_row, wanted.source_row, strict=True))
    tell_cut(backbone, [(text, int(sources[row] >= 0)) for row, text in enumerate(texts)])
    group = fill_cache(backbone, wanted, stream, sizing, cache, base_key, targets, share)
    wait()
    prompts = _rows(cache.places(group), list(wanted.prompts), cache.folder)
    there: dict[str, tuple[Path, int]] = {}
    for size in wanted.pictures_by_size():
        there |= cache.places(picture_group(base_key, size))
    pictures = _rows(there, list(wanted.pictures), cache.folder)
    return EncodedRecords(
        wanted.tasks,
        prompts,
        torch.tensor(wanted.prompt_row),
        pictures,
        torch.tensor(wanted.source_row),
        pictures,
        torch.tensor(wanted.target_row),
        sizing.height,
        sizing.width,
        torch.tensor(wanted.sizes) if sizing.own else None,
    )


def picture_group(base_key: str, size: tuple[int, int]) -> str:
    """The folder of pictures encoded at one (height, width)."""
    return f"pictures-{content_key(base_key, *size)}"


def fill_cache(
    backbone: Backbone,
    wanted: Wanted,
    stream: Callable[[], Iterable[Record]],
    sizing: Sizing,
    cache: EncodingCache,
    base_key: str,
    targets: bool,
    share: tuple[int, int],
) -> str:
    """Encode this worker's share of what a cache lacks; returns the prompts' group."""
    sees = backbone.prompt_sees_source
    places = (sizing.height, sizing.width, sizing.own) if sees else ()
    prompts = f"prompts-{content_key(base_key, *places)}"
    told = _Teller()
    filling = _GroupFill(
        cache, prompts, list(wanted.prompts), prompt_encoder(backbone, sizing), prompt_batch(backbone), share, told
    )
    if filling.lacking:
        shown = ((key, (text, None)) for key, text in wanted.prompts.items())
        for key, prompt in _seen_prompts(stream()) if sees else shown:
            filling.offer(key, prompt)
    by_size = wanted.pictures_by_size()
    fillings = {
        size: _GroupFill(
            cache,
            picture_group(base_key, size),
            keys,
            picture_encoder(backbone, *size),
            picture_batch(*size),
            share,
            told,
            len(by_size),
        )
        for size, keys in by_size.items()
    }
    if any(filling.lacking for filling in fillings.values()):
        for key, picture in _pictures(stream(), targets):
            fillings[wanted.pictures[key]].offer(key, picture)
    return prompts


def _rows(places: dict[str, tuple[Path, int]], keys: list[str], folder: Path) -> CachedRows:
    missing = sum(key not in places for key in keys)
    if missing:
        raise UserError(f"{folder}: {missing} of {len(keys)} encodings are missing; did a worker fail? Run it again")
    return CachedRows([places[key] for key in keys])


class _Teller:
    """Says now and then how far the work is."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def say(self, group: str, done: int, left: int) -> None:
        if time.monotonic() - self._last > TELL_EVERY:
            self._last = time.monotonic()
            log.info("%s: %d encoded, %d left", group, done, left)


class _GroupFill:
    """Encodes this worker's share of what one group lacks, shard by shard, from the items it is offered.

    All workers cut all of the group's keys into the same shards, whatever is there already, and each takes every n-th.
    """

    def __init__(
        self,
        cache: EncodingCache,
        group: str,
        keys: list[str],
        encode: Callable[[list], Tensor],
        batch: int,
        share: tuple[int, int],
        teller: _Teller,
        groups: int = 1,
    ):
        self._cache, self._group, self._keys, self._encode, self._batch = cache, group, keys, encode, batch
        self._share, self._teller, self._groups = share, teller, groups
        there = cache.places(group)
        self.lacking = {key for key in keys if key not in there}
        self._mine: dict[str, int] | None = None
        self._waiting: dict[int, dict[str, object]] = {}
        self._done = 0

    def offer(self, key: str, item: object) -> None:
        """Take an item if it is this worker's and missing; write its shard if that is complete."""
        if not self.lacking:
            return
        if self._mine is None:
            self._mine = self._plan(item)
        number = self._mine.pop(key, None)
        if number is None:
            return
        shard = self._waiting.setdefault(number, {})
        shard[key] = item
        if len(shard) == self._left[number]:
            del self._waiting[number]
            rows = torch.cat(list(encode_in_batches(self._encode, list(shard.values()), self._batch)))
            self._cache.write(self._group, list(shard), rows)
            self._done += len(shard)
            self._teller.say(self._group, self._done, len(self._mine))

    def _plan(self, first: object) -> dict[str, int]:
        """This worker's keys that are lacking, each with its shard."""
        worker, workers = self._share
        size = self._shard_rows(first)
        shard_of = {key: number // size for number, key in enumerate(self._keys)}
        mine = {key: n for key, n in shard_of.items() if n % workers == worker and key in self.lacking}
        self._left = Counter(mine.values())
        log.info("%s: encoding %d of %d in %d shards", self._group, len(mine), len(self._keys), len(self._left))
        return mine

    def _shard_rows(self, first: object) -> int:
        """Rows of a shard: whole batches, so many that the shards under way are about `SHARD_BYTES` together."""
        row = next(encode_in_batches(self._encode, [first], self._batch))[0]
        most = min(MOST_ROWS, SHARD_BYTES // (row.numel() * row.element_size() * self._groups))
        return max(1, most // self._batch) * self._batch
