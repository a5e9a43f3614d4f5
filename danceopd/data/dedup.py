"""Near-duplicates by perceptual hash: pictures that look alike though their bytes differ.

The hash is the difference hash (dHash): whether each pixel of a 9x8 thumbnail is brighter than its right neighbour.
It is taken of each colour channel, so that a recoloured object makes another picture.
"""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

SIDE = 8
BITS = 3 * SIDE * SIDE
_FLAT = 6  # range of a thumbnail below which its gradients are noise


def picture_hash(image: Image.Image) -> int:
    """A 192-bit perceptual hash of an RGB picture; equal for the same picture at another size or quality.

    A picture without structure (one colour, nearly) has no gradients to compare; its coarse colour is hashed instead.
    """
    small = image.resize((SIDE + 1, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    pixels = np.asarray(small, dtype=np.int16)
    if int(np.ptp(pixels, axis=(0, 1)).max()) < _FLAT:
        colour = (pixels.mean(axis=(0, 1)) / 8).round().astype(np.uint8).tobytes()
        return int.from_bytes(hashlib.sha256(b"flat" + colour).digest()[: BITS // 8], "big")
    bits = pixels[:, 1:] > pixels[:, :-1]
    return int.from_bytes(np.packbits(bits.transpose(2, 0, 1)).tobytes(), "big")


class DuplicateFinder:
    """Remembers what it has seen and finds what is near it, in memory for the hashes alone.

    Two hashes at most `distance` bits apart agree wholly in one of `distance + 1` bands, so only those that share a
    band are compared.

    Args:
        distance: bits that may differ, over all of an item's pictures together.
    """

    def __init__(self, distance: int):
        self.distance = distance
        self._bands: list[dict[tuple, list[tuple[int, str]]]] = [{} for _ in range(distance + 1)]

    def seen(self, hashes: tuple[int, ...], text: str, name: str) -> str | None:
        """The name of an earlier item with the same text and pictures this near, or None; then it is remembered.

        Args:
            hashes: of the item's pictures, always in the same order.
            text: must be equal (the instruction of an edit; empty where pictures alone decide).
            name: of this item.
        """
        known = self.find(hashes, text)
        if known is None:
            whole, keys = self._keys(hashes, text)
            for key, band in zip(keys, self._bands, strict=True):
                band.setdefault(key, []).append((whole, name))
        return known

    def find(self, hashes: tuple[int, ...], text: str) -> str | None:
        """The name of an item with the same text and pictures this near, or None; nothing is remembered."""
        whole, keys = self._keys(hashes, text)
        for key, band in zip(keys, self._bands, strict=True):
            for other, known in band.get(key, ()):
                if (whole ^ other).bit_count() <= self.distance:
                    return known
        return None

    def _keys(self, hashes: tuple[int, ...], text: str) -> tuple[int, list[tuple]]:
        whole = 0
        for value in hashes:
            whole = (whole << BITS) | value
        label = hashlib.sha256(f"{len(hashes)}\0{text}".encode()).digest()[:8]
        size = -(-BITS * len(hashes) // (self.distance + 1))
        return whole, [(label, (whole >> (i * size)) & ((1 << size) - 1)) for i in range(self.distance + 1)]
