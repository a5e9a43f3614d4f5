"""Records encoded: in memory, or through a cache that all workers fill and read.

What records need is told from their columns; a record itself is read where one of its encodings is missing and this
worker's to make. All workers cut what a group of encodings needs into the same shards, whatever is there already, and
each takes every n-th; so several processes, pods or jobs make one cache, and one that was killed goes on.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from danceopd.backbones.base import Backbone
from danceopd.data.cache import LATENTS, PROMPTS, CachedRows, EncodingCache, Places
from danceopd.data.columns import KEY, RecordTable, key_of, table_of
from danceopd.data.encoded import (
    CutPrompts,
    EncodedRecords,
    Prompt,
    Rows,
    Sizing,
    UnevenRows,
    check_size,
    encode_in_batches,
    picture_batch,
    picture_encoder,
    prompt_batch,
    prompt_encoder,
    prompt_of,
    say_cut,
    tell_cut,
)
from danceopd.data.records import Record
from danceopd.errors import UserError
from danceopd.files import content_key

log = logging.getLogger(__name__)
KEPT = "encodings"  # the folder of a cache's folder that `encode_records` fills
SHARD_BYTES = 1 << 30
MOST_ROWS = 4096  # of a shard: what a worker that is killed loses at most
TELL_EVERY = 30.0  # seconds
NOTHING = "no records to encode; check the recipe's tasks against the dataset's splits"


# -------------------------------------------------------------------------------------------------- what is wanted


@dataclass(frozen=True)
class Wanted:
    """What records need, told from their columns.

    Attributes:
        table: the N records.
        prompts: keys of the U distinct prompts, in the order they are met.
        prompt_first: the first record of each, (U,), rising.
        prompt_row: each record's row in `prompts`, (N,).
        pictures: keys of the distinct sources and targets, in the order they are met.
        picture_first: the first record of each, rising.
        source_row: each record's row in `pictures`, or -1, (N,).
        target_row: the same; -1 throughout if targets are not wanted.
        sizes: (height, width) at which each record is encoded, (N, 2).
    """

    table: RecordTable
    prompts: pa.Array
    prompt_first: np.ndarray
    prompt_row: np.ndarray
    pictures: pa.Array
    picture_first: np.ndarray
    source_row: np.ndarray
    target_row: np.ndarray
    sizes: np.ndarray

    def picture_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct (height, width) of pictures, (K, 2), and which of them each picture has."""
        sizes, kind = np.unique(self.sizes[self.picture_first], axis=0, return_inverse=True)
        return sizes, kind.reshape(-1)


def wanted_by(backbone: Backbone, table: RecordTable, targets: bool, sizing: Sizing) -> Wanted:
    """What records need encoded.

    Raises:
        UserError: if there are none, or a record's own size does not suit the back end.
    """
    if not len(table):
        raise UserError(NOTHING)
    columns = table.columns
    sources, wished = (columns[name].combine_chunks() for name in ("source_key", "target_key"))
    prompts = columns["prompt_key"].combine_chunks()
    if backbone.prompt_sees_source:
        prompts = _seen_keys(prompts, sources)
    prompts, prompt_row, prompt_first = _distinct(prompts)
    count = len(sources)
    pairs = pa.concat_arrays([sources, wished if targets else pa.nulls(count, KEY)])
    pictures, rows, first = _distinct(pairs.take(pa.array(np.arange(2 * count).reshape(2, count).T.ravel())))
    sizes = np.tile(np.array([[sizing.height, sizing.width]]), (count, 1))
    if sizing.own:
        own = [columns[name].combine_chunks() for name in ("height", "width")]
        has = own[0].is_valid().to_numpy(zero_copy_only=False)
        sizes[has] = np.stack([of.drop_null().to_numpy() for of in own], axis=1)
        for size, record in zip(*np.unique(sizes, axis=0, return_index=True), strict=True):
            check_size(backbone, (int(size[0]), int(size[1])), table.texts("id", [record])[0])
    return Wanted(table, prompts, prompt_first, prompt_row, pictures, first // 2, rows[0::2], rows[1::2], sizes)


def _seen_keys(prompts: pa.Array, sources: pa.Array) -> pa.Array:
    """Names of prompts and of the source images they have seen."""
    pairs = zip(prompts.to_pylist(), sources.to_pylist(), strict=True)
    return pa.array([text if source is None else key_of(text + source) for text, source in pairs], KEY)


def _distinct(keys: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Distinct keys in the order they are met, each key's number among them (or -1 of none), and where each is met."""
    coded = keys.dictionary_encode()
    rows = coded.indices.fill_null(-1).to_numpy().astype(np.int64)
    there = np.flatnonzero(rows >= 0)
    _, first = np.unique(rows[there], return_index=True)
    return coded.dictionary, rows, there[first]


# ---------------------------------------------------------------------------------------------- through a cache


def encode_cached(
    backbone: Backbone,
    table: RecordTable,
    sizing: Sizing,
    cache: EncodingCache,
    encoders: str,
    targets: bool,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> EncodedRecords:
    """Encode records through a cache: what it lacks is encoded and added, by all workers together.

    The result equals `encode_records` of the same records to the bit, or as bfloat16 holds it if the cache keeps that;
    rows stay on disk until they are asked for.

    Args:
        backbone: the model family whose encoders are used; not called if nothing is missing.
        table: the records; no more than some shards' encodings of them are in memory at once.
        sizing: of the pictures; must suit the back end.
        cache: where encodings lie.
        encoders: identity of the encoders and of how they are used.
        targets: whether target images are encoded too.
        share: this worker's number and how many there are.
        wait: returns once every worker is done.

    Raises:
        UserError: if there are no records, a picture cannot be read, or a shard is damaged.
    """
    wanted = wanted_by(backbone, table, targets, sizing)
    made = fill_cache(backbone, wanted, sizing, cache, encoders, share)
    wait()
    if made and share[0] == 0:
        cache.write_index()
    prompts, pictures = _places(backbone, wanted, sizing, cache, encoders)
    for places in (prompts, pictures):
        if not places.there.all():
            missing, total = int((~places.there).sum()), len(places.there)
            raise UserError(
                f"{cache.folder}: {missing} of {total} encodings are missing; did a worker fail? Run it again"
            )
    say_cut(_cut(backbone, wanted, prompts))
    rows = CachedRows(pictures)
    return EncodedRecords(
        table.texts("task"),
        CachedRows(prompts),
        torch.from_numpy(wanted.prompt_row),
        rows,
        torch.from_numpy(wanted.source_row.copy()),
        rows,
        torch.from_numpy(wanted.target_row.copy()),
        sizing.height,
        sizing.width,
        torch.from_numpy(wanted.sizes) if sizing.own else None,
    )


def _cut(backbone: Backbone, wanted: Wanted, places: Places) -> CutPrompts | None:
    """The prompts that are cut, as the shards tell it."""
    if not (count := int((places.lost > 0).sum())):
        return None
    worst = int(places.lost.argmax())
    [text] = wanted.table.texts("prompt", [wanted.prompt_first[worst]])
    limit = backbone.settings.max_sequence_length
    return CutPrompts(count, len(places.lost), limit, int(places.lost[worst]), text)


def prompt_group(backbone: Backbone, sizing: Sizing, cache: EncodingCache, encoders: str) -> str:
    """The folder of prompts."""
    places = (sizing.height, sizing.width, sizing.own) if backbone.prompt_sees_source else ()
    return cache.group(PROMPTS, encoders, *places)


def picture_group(cache: EncodingCache, encoders: str, size: tuple[int, int]) -> str:
    """The folder of pictures encoded at one (height, width)."""
    return cache.group(LATENTS, encoders, *size)


def _places(
    backbone: Backbone, wanted: Wanted, sizing: Sizing, cache: EncodingCache, encoders: str
) -> tuple[Places, Places]:
    """Where prompts and pictures lie; the pictures' may be in several groups, one a size."""
    prompts = cache.places(prompt_group(backbone, sizing, cache, encoders), wanted.prompts)
    sizes, kind = wanted.picture_sizes()
    count = len(wanted.pictures)
    shards: list[Path] = []
    whole = Places(shards, np.full(count, -1), np.full(count, -1), np.zeros(count, np.int64))
    for number, size in enumerate(sizes.tolist()):
        mine = np.flatnonzero(kind == number)
        found = cache.places(picture_group(cache, encoders, tuple(size)), wanted.pictures.take(pa.array(mine)))
        whole.shard[mine] = np.where(found.there, found.shard + len(shards), -1)
        whole.row[mine] = found.row
        shards += found.shards
    return prompts, whole


def fill_cache(
    backbone: Backbone, wanted: Wanted, sizing: Sizing, cache: EncodingCache, encoders: str, share: tuple[int, int]
) -> bool:
    """Encode this worker's share of what a cache lacks; whether anything was lacking, be it another worker's."""
    prompts, pictures = _places(backbone, wanted, sizing, cache, encoders)
    told = _Teller()
    _fill_prompts(backbone, wanted, sizing, _Filling(cache, share, told, encoders), prompts)
    _fill_pictures(backbone, wanted, sizing, _Filling(cache, share, told, encoders), pictures)
    return not (prompts.there.all() and pictures.there.all())


@dataclass(frozen=True)
class _Filling:
    """What filling any group takes: where to, this worker's share, and who tells how far it is."""

    cache: EncodingCache
    share: tuple[int, int]
    teller: _Teller
    encoders: str

    def shard_of(self, count: int, row_size: int, batch: int, groups: int = 1) -> np.ndarray:
        """Which shard each of `count` rows goes to.

        Whole batches each; so many rows that the shards under way are about `SHARD_BYTES` together, and few enough that
        every worker has a share.

        Args:
            count: rows of the group.
            row_size: numbers in a row.
            batch: rows that are encoded at once.
            groups: that are filled at the same time.
        """
        most = min(
            MOST_ROWS, SHARD_BYTES // (row_size * self.cache.keeps.itemsize * groups), -(-count // self.share[1])
        )
        return np.arange(count) // (max(1, most // batch) * batch)

    def mine(self, there: np.ndarray, shard: np.ndarray) -> np.ndarray:
        """Which rows are missing and this worker's."""
        worker, workers = self.share
        return ~there & (shard % workers == worker)


def _fill_prompts(backbone: Backbone, wanted: Wanted, sizing: Sizing, fill: _Filling, places: Places) -> None:
    if places.there.all():
        return
    count, table = len(wanted.prompts), wanted.table
    edits = (wanted.source_row[wanted.prompt_first] >= 0).astype(int)
    rows, width = backbone.prompt_shape(bool(edits.any()))
    shard = fill.shard_of(count, rows * width, prompt_batch(backbone))
    mine = np.flatnonzero(fill.mine(places.there, shard))
    group = prompt_group(backbone, sizing, fill.cache, fill.encoders)
    encode = prompt_encoder(backbone, sizing)
    maker = _Maker(fill, group, encode, prompt_batch(backbone), Counter(shard[mine].tolist()), count)
    for at, prompt in zip(mine.tolist(), _prompts(backbone, table, wanted.prompt_first[mine]), strict=True):
        [lost] = backbone.tokens_lost([prompt[0]], int(edits[at]))
        maker.offer(int(shard[at]), wanted.prompts[at].as_py(), prompt, lost)
    maker.finish()


def _prompts(backbone: Backbone, table: RecordTable, rows: np.ndarray) -> Iterator[Prompt]:
    """The prompts of some records; a record is read only where its prompt sees its source."""
    if backbone.prompt_sees_source:
        yield from (prompt_of(record, True) for record in table.read(rows.tolist()))
        return
    for start in range(0, len(rows), MOST_ROWS):
        yield from ((text, None) for text in table.texts("prompt", rows[start : start + MOST_ROWS]))


def _fill_pictures(backbone: Backbone, wanted: Wanted, sizing: Sizing, fill: _Filling, places: Places) -> None:
    if places.there.all():
        return
    sizes, kind = wanted.picture_sizes()
    shard, mine = np.zeros(len(kind), np.int64), np.zeros(len(kind), bool)
    makers = []
    for number, (height, width) in enumerate(sizes.tolist()):
        alike, batch = np.flatnonzero(kind == number), picture_batch(height, width)
        tokens, channels = backbone.latent_shape(height, width)
        shard[alike] = fill.shard_of(len(alike), tokens * channels, batch, len(sizes))
        mine[alike] = fill.mine(places.there[alike], shard[alike])
        left = Counter(shard[alike][mine[alike]].tolist())
        group = picture_group(fill.cache, fill.encoders, (height, width))
        makers.append(_Maker(fill, group, picture_encoder(backbone, height, width), batch, left, len(alike)))
    rows = np.unique(wanted.picture_first[mine])
    for row, record in zip(rows.tolist(), wanted.table.read(rows.tolist()), strict=True):
        for name, at in (("source", wanted.source_row[row]), ("target", wanted.target_row[row])):
            if at >= 0 and mine[at]:
                mine[at] = False
                item = getattr(record, name), f"record {record.id!r}, {name}"
                makers[kind[at]].offer(int(shard[at]), wanted.pictures[at].as_py(), item)
    for maker in makers:
        maker.finish()


class _Teller:
    """Says now and then how far the work is."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def say(self, group: str, done: int, left: int) -> None:
        if time.monotonic() - self._last > TELL_EVERY:
            self._last = time.monotonic()
            log.info("%s: %d encoded, %d left", group, done, left)


class _Maker:
    """Encodes one group's items in batches as they are offered, and writes each shard once its last row is there."""

    def __init__(
        self,
        fill: _Filling,
        group: str,
        encode: Callable[[list], Tensor],
        batch: int,
        left: Counter[int],
        total: int,
    ):
        self._fill, self._group, self._encode, self._batch, self._left = fill, group, encode, batch, left
        self._offered: list[tuple[int, bytes, int, object]] = []
        self._made: dict[int, list[tuple[bytes, Tensor, int]]] = {}
        self._done = 0
        if left:
            log.info("%s: encoding %d of %d in %d shards", group, left.total(), total, len(left))

    def offer(self, shard: int, key: bytes, item: object, lost: int = 0) -> None:
        """Take an item of a shard; `lost`: tokens of it that no encoder sees."""
        self._offered.append((shard, key, lost, item))
        if len(self._offered) == self._batch:
            self._encode_offered()

    def finish(self) -> None:
        """Encode and write what is left."""
        if self._offered:
            self._encode_offered()

    def _encode_offered(self) -> None:
        [rows] = encode_in_batches(self._encode, [item for *_, item in self._offered], self._batch)
        for (shard, key, lost, _), row in zip(self._offered, rows, strict=True):
            made = self._made.setdefault(shard, [])
            made.append((key, self._fill.cache.narrow(row).clone(), lost))
            if len(made) == self._left[shard]:
                self._write(shard)
        self._offered = []

    def _write(self, shard: int) -> None:
        keys, rows, lost = zip(*self._made.pop(shard), strict=True)
        whole = max((row.dtype for row in rows), key=lambda dtype: dtype.itemsize)  # one of them may need float32
        self._fill.cache.write(self._group, keys, [row.to(whole) for row in rows], lost)
        self._done += len(keys)
        self._fill.teller.say(self._group, self._done, self._left.total() - self._done)


# ------------------------------------------------------------------------------------------------------ in memory


def encode_records(
    backbone: Backbone,
    records: list[Record],
    height: int,
    width: int,
    cache: Path | None,
    encoders: str,
    targets: bool,
    own_sizes: bool = False,
) -> EncodedRecords:
    """Encode records, or read back what of them was encoded before.

    Args:
        backbone: the model family whose encoders are used.
        records: any records; tasks may be mixed.
        height: of the pictures; must suit the back end.
        width: of the pictures.
        cache: folder for encodings, which then stay on disk until they are asked for; None: all is kept in memory.
        encoders: identity of the encoders and of how they are used, part of the cache's keys.
        targets: whether target images are encoded too (distillation needs none).
        own_sizes: each record is encoded at its pictures' own size, and at `height` x `width` if it has none.

    Raises:
        UserError: if there are no records, or a picture cannot be read, or has a size of its own that does not suit.
    """
    sizing = Sizing(height, width, own_sizes)
    table = table_of(records)
    if cache is not None:
        return encode_cached(backbone, table, sizing, EncodingCache(Path(cache) / KEPT), encoders, targets)
    wanted = wanted_by(backbone, table, targets, sizing)
    firsts = [records[row] for row in wanted.prompt_first.tolist()]
    tell_cut(backbone, [(record.prompt, int(record.source is not None)) for record in firsts])
    log.info("encoding %d prompts, %d pictures", len(wanted.prompts), len(wanted.pictures))
    prompts = [prompt_of(record, backbone.prompt_sees_source) for record in firsts]
    made = encode_in_batches(prompt_encoder(backbone, sizing), prompts, prompt_batch(backbone))
    pictures = _encode_pictures(backbone, wanted, records)
    return EncodedRecords(
        [record.task for record in records],
        torch.cat(list(made)),
        torch.from_numpy(wanted.prompt_row),
        pictures,
        torch.from_numpy(wanted.source_row.copy()),
        pictures,
        torch.from_numpy(wanted.target_row.copy()),
        height,
        width,
        torch.from_numpy(wanted.sizes) if own_sizes else None,
    )


def _encode_pictures(backbone: Backbone, wanted: Wanted, records: Sequence[Record]) -> Tensor | Rows:
    """Latents of the wanted pictures, in their order."""
    sizes, kind = wanted.picture_sizes()
    rows: list[Tensor] = [torch.empty(0, 0)] * len(kind)
    for number, (height, width) in enumerate(sizes.tolist()):
        alike = np.flatnonzero(kind == number).tolist()
        items = [_picture(wanted, records, at) for at in alike]
        parts = encode_in_batches(picture_encoder(backbone, height, width), items, picture_batch(height, width))
        for at, row in zip(alike, torch.cat(list(parts)), strict=True):
            rows[at] = row
    if len(sizes) > 1:
        return UnevenRows(rows)
    return torch.stack(rows) if rows else torch.empty(0, 0, 0)


def _picture(wanted: Wanted, records: Sequence[Record], at: int) -> tuple[bytes | None, str]:
    row = int(wanted.picture_first[at])
    name = "source" if wanted.source_row[row] == at else "target"
    return getattr(records[row], name), f"record {records[row].id!r}, {name}"


def encode_empty(backbone: Backbone, cache: Path | None, encoders: str) -> Tensor:
    """The empty prompt's embedding (L, D), or what was kept of it, so that guidance needs no text encoder.

    Args:
        backbone: the model family whose encoder is used.
        cache: folder for encoded tensors, or None for no cache.
        encoders: identity of the encoders and of how they are used, part of the cache's key.
    """
    path = None if cache is None else Path(cache) / f"empty-{content_key(encoders)}.safetensors"
    if path is not None and path.is_file():
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("empty")
    empty = backbone.encode_prompts([""])[0].cpu().contiguous()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
        save_file({"empty": empty}, scratch)
        scratch.replace(path)
    return empty
