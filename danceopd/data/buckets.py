"""Sizes for pictures of many shapes: aspect-ratio buckets, and one crop for a source and its target.

A bucket is a size (height, width) whose area is close to one number and whose sides suit the back end's patches; a
picture goes to the bucket whose ratio is nearest its own, so that little is cropped and nothing is distorted.
"""

from __future__ import annotations

import functools
import math

from PIL import Image

from danceopd.data.pictures import Refused


@functools.cache
def bucket_sizes(area: int, step: int, max_ratio: float) -> tuple[tuple[int, int], ...]:
    """All bucket sizes, from the widest to the tallest.

    Args:
        area: pixels a picture should have; a bucket has at most this many.
        step: both sides are multiples of it.
        max_ratio: of the longer side to the shorter, at least 1.

    Returns:
        (height, width) pairs, each with its mirror image.
    """
    sizes = set()
    for short in range(step, math.isqrt(area) + 1, step):
        long = area // short // step * step
        if long <= short * max_ratio:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest_bucket(size: tuple[int, int], sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The size (height, width) of `sizes` whose ratio is nearest that of `size`, on a logarithmic scale."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - ratio), s))


def same_shape(first: tuple[int, int], second: tuple[int, int], tolerance: float) -> bool:
    """Whether two (height, width) sizes have one ratio, up to a share of it."""
    return abs(math.log(first[0] * second[1] / (first[1] * second[0]))) <= tolerance


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to `size` (height, width), cropping what sticks out, alike on both sides.

    The crop is the same share of any picture of the same ratio, so a source and a target of different resolutions
    stay aligned.
    """
    height, width = size
    if (image.height, image.width) == size:
        return image
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def check_shape(size: tuple[int, int], min_side: int, max_ratio: float, where: str) -> None:
    """Refuse pictures that are too small, or too long and thin.

    Raises:
        Refused: naming `where`.
    """
    short, long = min(size), max(size)
    if short < min_side:
        raise Refused("picture-too-small", f"{where}: is {size[0]}x{size[1]}; the shorter side must have {min_side}")
    if long / short > max_ratio:
        raise Refused("picture-too-narrow", f"{where}: is {size[0]}x{size[1]}; at most {max_ratio:g} to 1 is taken")
