"""What training reads of records: prompt embeddings and latents by row, and the encoders that make them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from danceopd.backbones.base import Backbone, Condition
from danceopd.data.pictures import read_size
from danceopd.data.records import Record, decode_image
from danceopd.errors import UserError

log = logging.getLogger(__name__)
ROWS = ("prompts", "sources", "targets")
BATCH = 16
BATCH_PIXELS = BATCH * 256 * 256


class Rows(ABC):
    """Rows that may differ in length or lie on disk; indexed like the tensor (N, ...) they would be."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> Tensor:
        """One row, float32."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """Rows of one length by number (B,): (B, ...)."""
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


def check_size(backbone: Backbone, size: tuple[int, int], record: str) -> None:
    """Check that the back end takes a picture of a record's size; `record` is its id.

    Raises:
        UserError: naming the record.
    """
    try:
        backbone.latent_shape(*size)
    except UserError as error:
        raise UserError(
            f"record {record!r}: {error}; import the data with buckets that fit (resize.step), or set model.sizes: one"
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
        if not rows:
            return []
        picked = torch.tensor(rows)
        kind = (self.source_row[picked] >= 0).long()
        if self.sizes is not None:
            height, width = self.sizes[picked].unbind(1)
            kind = (kind << 40) + (height << 20) + width
        _, kind = torch.unique(kind, return_inverse=True)  # in rising order
        order = torch.argsort(kind, stable=True)
        return [part.tolist() for part in torch.split(order, torch.bincount(kind).tolist())]

    def thin(self) -> EncodedRecords:
        """The same records with one number, zero, for each prompt and picture: nothing is read for it."""
        none = {name: torch.zeros(1, 1, 1).expand(len(getattr(self, name)), 1, 1) for name in ROWS}
        return replace(self, prompts=none["prompts"], sources=none["sources"], targets=none["targets"])

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
    say_cut(cut_prompts(backbone, prompts))


def say_cut(cut: CutPrompts | None) -> None:
    """Say in the log how many prompts are cut, if any are."""
    if cut is not None:
        log.warning("%s", cut)
