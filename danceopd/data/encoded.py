"""Records turned into what training reads: prompt embeddings and latents, encoded once and cached on disk."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from danceopd.backbones.base import Backbone, Condition
from danceopd.data.records import Record, content_hash, decode_image
from danceopd.errors import UserError
from danceopd.files import content_key

if TYPE_CHECKING:
    from danceopd.data.cache import CachedRows

log = logging.getLogger(__name__)
BATCH = 16
BATCH_PIXELS = BATCH * 256 * 256


@dataclass(frozen=True)
class EncodedRecords:
    """Encoded records, in the order given.

    Attributes:
        tasks: task of each record, length N.
        prompts: embeddings of the distinct prompts, (U, L, D); they and the latents may lie in a cache on disk.
        prompt_row: row in `prompts` of each record, (N,).
        sources: latents of the source images, (S, T, C).
        source_row: row in `sources`, or -1, (N,).
        targets: latents of the target images, (R, T, C).
        target_row: row in `targets`, or -1, (N,).
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
    """

    tasks: list[str]
    prompts: Tensor | CachedRows
    prompt_row: Tensor
    sources: Tensor | CachedRows
    source_row: Tensor
    targets: Tensor | CachedRows
    target_row: Tensor
    height: int
    width: int

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
        )

    def shape_groups(self, rows: list[int]) -> list[list[int]]:
        """Positions in `rows` grouped by sequence length: samples without a source, samples with one."""
        with_source = (self.source_row[rows] >= 0).tolist()
        groups = [[i for i, has in enumerate(with_source) if has == kind] for kind in (False, True)]
        return [group for group in groups if group]

    def condition(self, rows: list[int], device: torch.device | str = "cpu") -> Condition:
        """The conditions of rows of one shape group."""
        source_rows = self.source_row[rows]
        source = None if bool((source_rows < 0).any()) else self.sources[source_rows].to(device)
        return Condition(self.prompts[self.prompt_row[rows]].to(device), source, self.height, self.width)

    def target(self, rows: list[int], device: torch.device | str = "cpu") -> Tensor:
        """Target latents (B, T, C) of rows that all have one."""
        return self.targets[self.target_row[rows]].to(device)


def load_pixels(data: bytes, height: int, width: int, where: str) -> Tensor:
    """Picture bytes as (3, height, width) in [-1, 1]; another size is cropped to the ratio and resized."""
    pixels = decode_image(data, where)
    if pixels.shape[:2] != (height, width):
        pixels = np.asarray(ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def encode_in_batches(encode: Callable[[list], Tensor], items: list, size: int) -> Iterator[Tensor]:
    """Encode items in batches of exactly `size`, the last one filled up with its last item.

    Kernels are chosen by a batch's shape, so that an item's encoding hangs on the item alone, to the bit, whatever it
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


def prompt_encoder(backbone: Backbone, height: int, width: int) -> Callable[[list], Tensor]:
    """Encodes prompts, each with the source image it has seen."""

    def encode(prompts: list[Prompt]) -> Tensor:
        shown = [
            [] if source is None else [load_pixels(source, height, width, "source image")] for _, source in prompts
        ]
        return backbone.encode_prompts([text for text, _ in prompts], shown)

    return encode


def _encode_pictures(backbone: Backbone, pictures: list[tuple[bytes, str]], height: int, width: int) -> Tensor:
    if not pictures:
        return torch.empty(0, *backbone.latent_shape(height, width))
    encode = picture_encoder(backbone, height, width)
    return torch.cat(list(encode_in_batches(encode, pictures, picture_batch(height, width))))


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
    backbone: Backbone, records: list[Record], height: int, width: int, cache: Path | None, base_key: str, targets: bool
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

    Raises:
        UserError: if there are no records, or a picture cannot be read.
    """
    if not records:
        raise UserError("no records to encode; check the recipe's tasks against the dataset's splits")
    prompts, prompt_row = _distinct([prompt_of(r, backbone.prompt_sees_source) for r in records])
    sources, source_row = _distinct([r.source for r in records])
    pictures, target_row = _distinct([r.target if targets else None for r in records])
    key = content_key(base_key, height, width, targets, content_hash(records))
    path = None if cache is None else Path(cache) / f"encoded-{key}.safetensors"

    def encode() -> dict[str, Tensor]:
        log.info("encoding %d prompts, %d sources, %d targets", len(prompts), len(sources), len(pictures))
        read = prompt_encoder(backbone, height, width)
        return {
            "prompts": torch.cat(list(encode_in_batches(read, prompts, prompt_batch(backbone)))),
            "sources": _encode_pictures(backbone, [(s, "source image") for s in sources], height, width),
            "targets": _encode_pictures(backbone, [(p, "target image") for p in pictures], height, width),
        }

    tensors = _cached(path, encode)
    return EncodedRecords(
        [r.task for r in records], tensors["prompts"], prompt_row, tensors["sources"], source_row,
        tensors["targets"], target_row, height, width,
    )  # fmt: skip
