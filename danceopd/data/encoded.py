"""Records turned into what training reads: prompt embeddings and latents, encoded once and cached on disk."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from danceopd.backbones.base import Backbone, Condition
from danceopd.data.pictures import read_size
from danceopd.data.records import Record, content_hash, decode_image
from danceopd.errors import UserError
from danceopd.files import content_key

log = logging.getLogger(__name__)
BATCH = 16
BATCH_PIXELS = BATCH * 256 * 256


class Rows:
    """Rows that may differ in length or lie on disk; indexed like the tensor (N, ...) they would be."""

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, number: int) -> Tensor:
        """One row, float32."""
        raise NotImplementedError

    def __getitem__(self, index: Tensor | tuple[slice, ...]) -> Tensor:
        """Rows of one length by number (B,): (B, ...); or a part of each row by slices, the first over the rows."""
        if isinstance(index, tuple):
            picked = [self.row(number)[index[1:]] for number in range(len(self))[index[0]]]
        else:
            picked = [self.row(number) for number in index.tolist()]
        return torch.stack(picked) if picked else torch.empty(0)


@dataclass(frozen=True)
class UnevenRows(Rows):
    """Rows in memory."""

    rows: list[Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> Tensor:
        """One row."""
        return self.rows[number]


@dataclass(frozen=True)
class Sizing:
    """The size at which pictures are encoded.

    Attributes:
        height: of every picture, or of records that have none.
        width: the same.
        own: each picture keeps its own size (that of its bucket).
    """

    height: int
    width: int
    own: bool = False

    def of(self, picture: bytes, where: str) -> tuple[int, int]:
        """(height, width) of one picture; `where` names it in errors."""
        return read_size(picture, where) if self.own else (self.height, self.width)

    def of_record(self, record: Record) -> tuple[int, int]:
        """(height, width) of a record: its source's or its target's; they are equal."""
        picture = record.target if record.source is None else record.source
        return (self.height, self.width) if picture is None else self.of(picture, f"record {record.id!r}")


def check_size(backbone: Backbone, size: tuple[int, int], record: Record) -> None:
    """Check that the back end takes a picture of a record's size.

    Raises:
        UserError: naming the record.
    """
    try:
        backbone.latent_shape(*size)
    except UserError as error:
        raise UserError(
            f"record {record.id!r}: {error}; import the data with buckets that fit (resize.step), or set "
            f"model.sizes: one"
        ) from error


@dataclass(frozen=True)
class EncodedRecords:
    """Encoded records, in the order given.

    Attributes:
        tasks: task of each record, length N.
        prompts: embeddings of the distinct prompts, (U, L, D); they and the latents may lie in a cache on disk.
        prompt_row: row in `prompts` of each record, (N,).
        sources: latents of the source images, (S, T, C); T is a picture's own where their sizes differ.
        source_row: row in `sources`, or -1, (N,).
        targets: latents of the target images, (R, T, C).
        target_row: row in `targets`, or -1, (N,).
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        sizes: each record's own (height, width), int64 (N, 2); None: all are `height` x `width`.
        ids: finds the ids of rows' records, for messages; None: not known.
    """

    tasks: list[str]
    prompts: Tensor | Rows
    prompt_row: Tensor
    sources: Tensor | Rows
    source_row: Tensor
    targets: Tensor | Rows
    target_row: Tensor
    height: int
    width: int
    sizes: Tensor | None = None
    ids: Callable[[Sequence[int]], list[str]] | None = None

    def size(self, row: int) -> tuple[int, int]:
        """(height, width) of a record's pictures."""
        return (self.height, self.width) if self.sizes is None else tuple(self.sizes[row].tolist())

    def rows_by_task(self) -> dict[str, list[int]]:
        """Row numbers of each task."""
        rows: dict[str, list[int]] = {}
        for number, task in enumerate(self.tasks):
            rows.setdefault(task, []).append(number)
        return rows

    def subset(self, rows: list[int]) -> EncodedRecords:
        """Some of the records, in the order of `rows`; tensors are shared."""
        return replace(
            self,
            tasks=[self.tasks[row] for row in rows],
            prompt_row=self.prompt_row[rows],
            source_row=self.source_row[rows],
            target_row=self.target_row[rows],
            sizes=None if self.sizes is None else self.sizes[rows],
            ids=None,
        )

    def shape_groups(self, rows: list[int]) -> list[list[int]]:
        """Positions in `rows` grouped by sequence length: samples without a source, samples with one, by size."""
        groups: dict[tuple, list[int]] = {}
        for position, has in enumerate((self.source_row[rows] >= 0).tolist()):
            groups.setdefault((has, *self.size(rows[position])), []).append(position)
        return [groups[kind] for kind in sorted(groups)]

    def condition(self, rows: list[int], device: torch.device | str = "cpu") -> Condition:
        """The conditions of rows of one shape group."""
        source_rows = self.source_row[rows]
        source = None if bool((source_rows < 0).any()) else self.sources[source_rows].to(device)
        return Condition(self.prompts[self.prompt_row[rows]].to(device), source, *self.size(rows[0]))

    def target(self, rows: list[int], device: torch.device | str = "cpu") -> Tensor:
        """Target latents (B, T, C) of rows of one size that all have one."""
        return self.targets[self.target_row[rows]].to(device)


def load_pixels(data: bytes, height: int, width: int, where: str) -> Tensor:
    """Picture bytes as (3, height, width) in [-1, 1]; another size is cropped to the ratio and resized."""
    pixels = decode_image(data, where)
    if pixels.shape[:2] != (height, width):
        pixels = np.asarray(ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def encode_in_batches(encode: Callable[[list], Tensor], items: list, size: int) -> Iterator[Tensor]:
    """Encode items in batches of exactly `size`, the last one filled up with its last item.

    Kernels are chosen by a batch's shape, so that an item's encoding depends on the item alone, to the bit, whatever it
    is encoded together with: what a cache gives back is what would be encoded now.

    Yields:
        The encodings of `size` items (of what is left at the end), float32, on the CPU.
    """
    for start in range(0, len(items), size):
        part = items[start : start + size]
        yield encode(part + part[-1:] * (size - len(part)))[: len(part)].float().cpu()


def picture_batch(height: int, width: int) -> int:
    """How many pictures of this size are encoded at once."""
    return max(1, min(BATCH, BATCH_PIXELS // (height * width)))


def picture_encoder(backbone: Backbone, height: int, width: int) -> Callable[[list], Tensor]:
    """Encodes (bytes, where) pairs at one size."""

    def encode(pictures: list[tuple[bytes, str]]) -> Tensor:
        return backbone.encode_images(
            torch.stack([load_pixels(data, height, width, where) for data, where in pictures])
        )

    return encode


Prompt = tuple[str, bytes | None]  # and the source image, where the back end's prompts see it


def prompt_of(record: Record, sees_source: bool) -> Prompt:
    """What a record's prompt embedding is made of."""
    return record.prompt, record.source if sees_source else None


def prompt_batch(backbone: Backbone) -> int:
    """How many prompts are encoded at once; what looks at images takes them one by one."""
    return 1 if backbone.prompt_sees_source else BATCH


def prompt_encoder(backbone: Backbone, sizing: Sizing) -> Callable[[list], Tensor]:
    """Encodes prompts, each with the source image it has seen."""
    where = "source image"

    def encode(prompts: list[Prompt]) -> Tensor:
        shown = [
            [] if source is None else [load_pixels(source, *sizing.of(source, where), where)] for _, source in prompts
        ]
        return backbone.encode_prompts([text for text, _ in prompts], shown)

    return encode


@dataclass(frozen=True)
class CutPrompts:
    """Prompts that are longer than their encoder takes.

    Attributes:
        count: of them, > 0.
        total: of all.
        limit: tokens that are seen.
        most: tokens that one of them loses.
        example: that one.
    """

    count: int
    total: int
    limit: int
    most: int
    example: str

    def __str__(self) -> str:
        shown = self.example if len(self.example) <= 40 else self.example[:40] + "..."
        return (
            f"{self.count:,} of {self.total:,} prompts are cut at {self.limit:,} tokens (model.max_sequence_length); "
            f"{shown!r} loses the most, {self.most:,}"
        )


def cut_prompts(backbone: Backbone, prompts: Iterable[tuple[str, int]]) -> CutPrompts | None:
    """Count the prompts whose end no encoder sees; None if there are none.

    Args:
        backbone: the model family whose tokenizer reads them.
        prompts: each with the number of source images it speaks of.
    """
    by_sources: dict[int, list[str]] = {}
    for text, sources in prompts:
        by_sources.setdefault(sources, []).append(text)
    lost = [
        (tokens, text)
        for sources, texts in by_sources.items()
        for tokens, text in zip(backbone.tokens_lost(texts, sources), texts, strict=True)
    ]
    cut = [found for found in lost if found[0]]
    return CutPrompts(len(cut), len(lost), backbone.settings.max_sequence_length, *max(cut)) if cut else None


def tell_cut(backbone: Backbone, prompts: Iterable[tuple[str, int]]) -> None:
    """Say in the log how many prompts are cut, if any are."""
    cut = cut_prompts(backbone, prompts)
    if cut is not None:
        log.warning("%s", cut)


def _encode_pictures(backbone: Backbone, pictures: list[bytes], name: str, sizing: Sizing) -> dict[str, Tensor]:
    """Latents by size, in the order the sizes are met, and each picture's place: rows of `places`, (P, 2)."""
    by_size: dict[tuple[int, int], list[bytes]] = {}
    places = torch.empty(len(pictures), 2, dtype=torch.int64)
    for row, picture in enumerate(pictures):
        size = sizing.of(picture, f"{name} image")
        alike = by_size.setdefault(size, [])
        places[row] = torch.tensor([list(by_size).index(size), len(alike)])
        alike.append(picture)
    found = {f"{name}.places": places}
    for number, (size, alike) in enumerate(by_size.items()):
        encode, batch = picture_encoder(backbone, *size), picture_batch(*size)
        parts = encode_in_batches(encode, [(picture, f"{name} image") for picture in alike], batch)
        found[f"{name}.{number}"] = torch.cat(list(parts))
    return found


def _pictures_of(tensors: dict[str, Tensor], name: str) -> Tensor | Rows:
    places = tensors[f"{name}.places"]
    if not len(places):
        return torch.empty(0, 0, 0)
    if not places[:, 0].any():
        return tensors[f"{name}.0"]
    return UnevenRows([tensors[f"{name}.{part}"][row] for part, row in places.tolist()])


def _distinct(values: list) -> tuple[list, Tensor]:
    """Distinct values that are not None in order of appearance, and each one's row or -1."""
    place: dict = {}
    rows = [-1 if v is None else place.setdefault(v, len(place)) for v in values]
    return list(place), torch.tensor(rows)


def _cached(path: Path | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file, made and written there if it is not there yet."""
    if path is not None and path.is_file():
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    tensors = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
        save_file(tensors, scratch)
        scratch.replace(path)
    return tensors


def encode_empty(backbone: Backbone, cache: Path | None, base_key: str) -> Tensor:
    """The empty prompt's embedding (L, D), or what was kept of it, so that guidance needs no text encoder.

    Args:
        backbone: the model family whose encoder is used.
        cache: folder for encoded tensors, or None for no cache.
        base_key: identity of the base (its encoders), part of the cache's key.
    """
    path = None if cache is None else Path(cache) / f"empty-{content_key(base_key)}.safetensors"
    return _cached(path, lambda: {"empty": backbone.encode_prompts([""])[0].cpu().contiguous()})["empty"]


def encode_records(
    backbone: Backbone,
    records: list[Record],
    height: int,
    width: int,
    cache: Path | None,
    base_key: str,
    targets: bool,
    own_sizes: bool = False,
) -> EncodedRecords:
    """Encode records, or read them back if this very set was encoded before.

    Args:
        backbone: the model family whose encoders are used.
        records: any records; tasks may be mixed.
        height: of the pictures; must suit the back end.
        width: of the pictures.
        cache: folder for the encoded tensors, or None for no cache.
        base_key: identity of the base (its encoders), part of the cache's key.
        targets: whether target images are encoded too (distillation needs none).
        own_sizes: each record is encoded at its pictures' own size, and at `height` x `width` if it has none.

    Raises:
        UserError: if there are no records, or a picture cannot be read, or has a size of its own that does not suit.
    """
    if not records:
        raise UserError("no records to encode; check the recipe's tasks against the dataset's splits")
    sizing, sizes = Sizing(height, width, own_sizes), None
    if own_sizes:
        found = [sizing.of_record(record) for record in records]
        for size, record in {size: record for size, record in zip(found, records, strict=True)}.items():
            check_size(backbone, size, record)
        sizes = torch.tensor(found)
    prompts, prompt_row = _distinct([prompt_of(r, backbone.prompt_sees_source) for r in records])
    sources, source_row = _distinct([r.source for r in records])
    pictures, target_row = _distinct([r.target if targets else None for r in records])
    tell_cut(backbone, [(text, int(source is not None)) for text, source in prompts])
    key = content_key(base_key, height, width, own_sizes, targets, content_hash(records))
    path = None if cache is None else Path(cache) / f"encoded-{key}.safetensors"

    def encode() -> dict[str, Tensor]:
        log.info("encoding %d prompts, %d sources, %d targets", len(prompts), len(sources), len(pictures))
        read = prompt_encoder(backbone, sizing)
        embedded = torch.cat(list(encode_in_batches(read, prompts, prompt_batch(backbone))))
        return (
            {"prompts": embedded}
            | _encode_pictures(backbone, sources, "source", sizing)
            | _encode_pictures(backbone, pictures, "target", sizing)
        )

    tensors = _cached(path, encode)
    return EncodedRecords(
        [r.task for r in records],
        tensors["prompts"],
        prompt_row,
        _pictures_of(tensors, "source"),
        source_row,
        _pictures_of(tensors, "target"),
        target_row,
        height,
        width,
        sizes,
    )
