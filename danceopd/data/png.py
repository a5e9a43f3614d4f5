"""A PNG writer whose bytes depend on the pixels alone, never on a codec's version.

Image libraries link whichever zlib they like, so the same picture becomes other bytes on another machine,
and a data version (DVC) would change with it. Stored (uncompressed) deflate blocks have one spelling only.
Pictures with at most 16 colors, as pixel-art has, are written with a 4-bit palette: 2 KB at 64x64.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_STORED_BLOCK = 65535


def _chunk(tag: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


def _deflate_stored(raw: bytes) -> bytes:
    blocks = [raw[i : i + _STORED_BLOCK] for i in range(0, len(raw), _STORED_BLOCK)] or [b""]
    body = b"".join(
        struct.pack("<BHH", i == len(blocks) - 1, len(b), len(b) ^ 0xFFFF) + b for i, b in enumerate(blocks)
    )
    return b"\x78\x01" + body + struct.pack(">I", zlib.adler32(raw))


def _scanlines(rows: np.ndarray) -> bytes:
    filter_none = np.zeros((rows.shape[0], 1), dtype=np.uint8)
    return np.concatenate([filter_none, rows], axis=1).tobytes()


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode `pixels` (H, W, 3), uint8, as PNG bytes.

    Raises:
        ValueError: if the array is not (H, W, 3) uint8.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"encode_png wants (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
    height, width, _ = pixels.shape
    codes = np.zeros((height, width, 4), dtype=np.uint8)
    codes[..., 1:] = pixels
    codes = codes.view(">u4")[..., 0].astype(np.uint32)
    palette = np.unique(codes)
    if len(palette) > 16:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = _scanlines(pixels.reshape(height, width * 3))
        return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", _deflate_stored(body)) + _chunk(b"IEND", b"")
    index = np.searchsorted(palette, codes).astype(np.uint8)
    if width % 2:
        index = np.pad(index, ((0, 0), (0, 1)))
    packed = (index[:, 0::2] << 4) | index[:, 1::2]
    colors = b"".join(int(c).to_bytes(3, "big") for c in palette)
    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)
    return (
        _SIGNATURE
        + _chunk(b"IHDR", header)
        + _chunk(b"PLTE", colors)
        + _chunk(b"IDAT", _deflate_stored(_scanlines(packed)))
        + _chunk(b"IEND", b"")
    )
