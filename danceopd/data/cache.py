"""A cache of encodings that many workers fill and many runs share: a plain folder of few, large safetensors shards.

    <cache>/index.arrow                           which shards there are, their sizes and the keys of their rows
    <cache>/latents-<group>/<keys>.safetensors    of pictures
    <cache>/prompts-<group>/<keys>.safetensors    prompt embeddings

A group names the encoder, the resolution and how rows are kept; a key the content (half a SHA-256 of the prompt or of
the picture's bytes). So a grown dataset, another recipe and another machine find what fits them and add what is
missing. A shard appears whole, by rename: a worker that was killed loses the shard it was at.

A shard holds `values`, the rows one behind the other; `starts`, where each begins; and `keys`. Zeros at a row's end are
left out and put back when it is read: where a family pads prompts with zeros (Z-Image, Qwen-Image) nothing is kept of
the padding, and where it attends to what the encoder makes of the padding (FLUX.2, Stable Diffusion 3.5) all is kept.
Either way a row comes back as it was, or as bfloat16 holds it where the cache keeps bfloat16. Readers map the files:
what is read lies in the system's page cache, once for all processes of a machine.
Put the folder under DVC or copy it to an object store as it is; a recipe's `cache` may be such a URI.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from danceopd.data.columns import KEY, KEY_BYTES
from danceopd.data.encoded import Rows
from danceopd.errors import UserError
from danceopd.files import content_key

INDEX = "index.arrow"
LATENTS, PROMPTS = "latents-", "prompts-"
EARLIER = ("index.json", "pictures-")  # of caches of an earlier version, which nothing reads any more
MOST_OPEN = 4096  # shards; each takes one or two of the 65,530 maps that the kernel gives a process
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Places:
    """Where rows lie.

    Attributes:
        shards: files.
        shard: number in `shards` of each of the N rows, or -1 of one that is not there.
        row: its number in that file.
        lost: how many tokens of each row's prompt no encoder saw; 0 of a picture.
    """

    shards: list[Path]
    shard: np.ndarray
    row: np.ndarray
    lost: np.ndarray

    @property
    def there(self) -> np.ndarray:
        """Whether each row is there."""
        return self.shard >= 0


@dataclass(frozen=True)
class _Shard:
    """One open shard: the values are mapped, not read."""

    values: Tensor
    starts: list[int]
    length: int


@dataclass
class CachedRows(Rows):
    """Rows that lie in a cache and are read when they are asked for.

    Attributes:
        places: of the N rows, all of them there.
    """

    places: Places
    _open: dict[int, _Shard] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.places.shard)

    def row(self, number: int) -> Tensor:
        """One row, float32."""
        shard, row = self._shard(int(self.places.shard[number])), int(self.places.row[number])
        first, last = shard.starts[row], shard.starts[row + 1]
        return F.pad(shard.values[first:last].float(), (0, 0, 0, shard.length - (last - first)))

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open)))
            with safe_open(self.places.shards[number], framework="pt") as file:
                values, starts = file.get_tensor("values"), file.get_tensor("starts").tolist()
                self._open[number] = _Shard(values, starts, int(file.metadata()["length"]))
        return self._open[number]


class EncodingCache:
    """The folder.

    Args:
        folder: where it lies.
        keeps: what rows are kept in; float32: as they are, in half the bytes where bfloat16 holds them exactly.
    """

    def __init__(self, folder: Path, keeps: torch.dtype = torch.float32):
        self.folder, self.keeps = Path(folder), keeps

    def group(self, kind: str, *of: object) -> str:
        """The folder's name of rows that were made alike: `LATENTS` or `PROMPTS`, and what decides their values."""
        return kind + content_key(*of, str(self.keeps))

    def places(self, group: str, keys: pa.Array) -> Places:
        """Where the rows of these keys lie.

        Raises:
            UserError: if a shard is damaged.
        """
        shards, tables = [], []
        known = self._index()
        for path in sorted((self.folder / group).glob(f"*{SUFFIX}")):
            shards.append(path)
            tables.append(self._keys(path, known))
        if not shards:
            none = np.full(len(keys), -1)
            return Places([], none, none, np.zeros(len(keys), np.int64))
        counts = [table.num_rows for table in tables]
        shard, row = np.repeat(np.arange(len(shards)), counts), np.concatenate([np.arange(n) for n in counts])
        held = pa.concat_tables(tables).combine_chunks()
        at = pc.index_in(keys, value_set=held["key"].combine_chunks()).fill_null(-1).to_numpy()
        lost = held["lost"].to_numpy()
        return Places(shards, *(np.where(at >= 0, of[at], other) for of, other in ((shard, -1), (row, -1), (lost, 0))))

    def _index(self) -> dict[str, tuple[int, pa.Table]]:
        """What the index says: size and columns of each shard."""
        try:
            table = pa.ipc.open_file(pa.memory_map(str(self.folder / INDEX))).read_all()
        except (OSError, pa.ArrowException):
            return {}
        if not table.num_rows:
            return {}
        names = table["shard"].combine_chunks()
        codes = names.indices.to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
        sizes, columns = table["bytes"], table.select(["key", "lost"])
        return {
            names.dictionary[int(codes[start])].as_py(): (sizes[start].as_py(), columns.slice(start, end - start))
            for start, end in pairwise(cuts)
        }

    def _keys(self, path: Path, known: dict[str, tuple[int, pa.Table]]) -> pa.Table:
        """The columns `key` and `lost` of a shard, from the index where that has it."""
        told, size = known.get(f"{path.parent.name}/{path.name}"), path.stat().st_size
        if told is not None and told[0] != size:
            raise _damaged(path, f"{size} bytes, the index says {told[0]}")
        if told is not None:
            return told[1]
        try:
            with safe_open(path, framework="np") as file:
                keys, lost = file.get_tensor("keys"), file.get_tensor("lost")
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        held = pa.FixedSizeBinaryArray.from_buffers(KEY, len(keys), [None, pa.py_buffer(keys.tobytes())])
        return pa.table({"key": held, "lost": pa.array(lost, pa.int64())})

    def write(self, group: str, keys: Sequence[bytes], rows: Sequence[Tensor], lost: Sequence[int] = ()) -> Path:
        """Add one shard.

        Args:
            group: of its rows.
            keys: of the n rows, `KEY_BYTES` each.
            rows: n rows (L, D) of one shape.
            lost: tokens of each row's prompt that no encoder saw; none given: 0.
        """
        folder = self.folder / group
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{content_key([key.hex() for key in keys])}{SUFFIX}"
        scratch = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
        lengths = torch.tensor([_used(row) for row in rows])
        values = torch.cat([row[:used] for row, used in zip(rows, lengths.tolist(), strict=True)])
        tensors = {
            "values": self.narrow(values),
            "starts": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES),
            "lost": torch.tensor(list(lost) or [0] * len(keys), dtype=torch.int64),
        }
        save_file(tensors, scratch, metadata={"length": str(len(rows[0]))})
        os.replace(scratch, path)
        return path

    def narrow(self, rows: Tensor) -> Tensor:
        """Rows as they are kept: in `keeps`; if that is float32 the same values in half the bytes, if bfloat16 holds
        them exactly (a text encoder in bfloat16 gives such)."""
        half = rows.bfloat16()
        return half if self.keeps == torch.bfloat16 or torch.equal(half.to(rows.dtype), rows) else rows

    def write_index(self) -> dict[str, int]:
        """Write the index anew from the shards; returns the number of rows by group."""
        names: list[str] = []
        tables, sizes = [], []
        rows: dict[str, int] = {}
        known = self._index()
        for folder in sorted(path for path in self.folder.glob("*/") if path.name.startswith((LATENTS, PROMPTS))):
            for path in sorted(folder.glob(f"*{SUFFIX}")):
                table = self._keys(path, known)
                names.append(f"{folder.name}/{path.name}")
                tables.append(table)
                sizes.append(path.stat().st_size)
                rows[folder.name] = rows.get(folder.name, 0) + table.num_rows
        if not tables:
            return rows
        counts = [table.num_rows for table in tables]
        shard = pa.DictionaryArray.from_arrays(np.repeat(np.arange(len(names), dtype=np.int32), counts), names)
        whole = pa.concat_tables(tables).combine_chunks()
        whole = whole.append_column("shard", shard).append_column("bytes", pa.array(np.repeat(sizes, counts)))
        scratch = (self.folder / INDEX).with_suffix(f".{uuid.uuid4().hex[:8]}")
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
            writer.write_table(whole)
        os.replace(scratch, self.folder / INDEX)
        return rows


def _used(row: Tensor) -> int:
    """How many rows of (L, D) there are before the zeros at the end; a negative zero is none of them."""
    bits = row.contiguous().view(torch.int16 if row.element_size() == 2 else torch.int32)
    held = bits.ne(0).any(dim=1).nonzero()
    return int(held[-1]) + 1 if len(held) else 0


def strangers(folder: Path) -> list[str] | None:
    """What a cache's folder holds beside the cache; None if it holds none. See `danceopd.files.check_output`."""
    names = [path.name for path in folder.iterdir()]
    own = [name for name in names if name == INDEX or name.startswith((LATENTS, PROMPTS, *EARLIER))]
    return sorted(set(names) - set(own)) if own else None


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: damaged ({' '.join(why.split())}); delete it, and what it held is encoded again")


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
