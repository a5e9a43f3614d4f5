"""Pictures of every kind become upright RGB, and each kind of damage has its own name."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from danceopd.data.buckets import bucket_sizes, check_shape, cover, nearest_bucket, same_shape
from danceopd.data.dedup import DuplicateFinder, picture_hash
from danceopd.data.pictures import Refused, read_picture

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels_of(data, **options):
    return np.asarray(read_picture(data, "x", **options).image)


def smooth(seed, size=(60, 80)):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def test_plain_pictures_come_as_they_are():
    picture = read_picture(encoded(Image.fromarray(PIXELS)), "x")
    assert np.array_equal(np.asarray(picture.image), PIXELS)
    assert not picture.changed
    assert picture.size == (24, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_put_upright(orientation):
    ways = [
        lambda x: x,
        np.fliplr,
        lambda x: np.rot90(x, 2),
        np.flipud,
        lambda x: np.rot90(np.fliplr(x)),
        np.rot90,
        lambda x: np.rot90(np.fliplr(x), -1),
        lambda x: np.rot90(x, -1),
    ]
    stored = Image.fromarray(np.ascontiguousarray(ways[orientation - 1](PIXELS)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, exif=exif)
    assert np.array_equal(pixels_of(data), PIXELS)
    assert read_picture(data, "x").changed == (orientation != 1)


def test_transparency_shows_the_matte():
    alpha = np.full((24, 40, 1), 255, np.uint8)
    alpha[:, :20] = 0
    data = encoded(Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)))
    assert (pixels_of(data)[:, :20] == 255).all()
    assert (pixels_of(data, matte=(1, 2, 3))[:, :20] == (1, 2, 3)).all()
    assert np.array_equal(pixels_of(data)[:, 20:], PIXELS[:, 20:])


def test_a_palette_with_a_transparent_entry_shows_the_matte():
    image = Image.fromarray(np.repeat([[0, 1]], 8, axis=0).astype(np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert pixels_of(encoded(image, transparency=0))[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    assert pixels_of(encoded(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_sixteen_bits_are_scaled_not_cut():
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for data in (encoded(Image.fromarray(deep)), encoded(Image.fromarray(deep), "TIFF")):
        assert pixels_of(data)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_becomes_rgb():
    cmyk = Image.fromarray(PIXELS).convert("CMYK")
    assert np.array_equal(pixels_of(encoded(cmyk, "TIFF")), PIXELS)
    assert pixels_of(encoded(cmyk, "JPEG")).shape == (24, 40, 3)


def test_another_colour_space_is_converted_and_srgb_left_alone():
    image = Image.fromarray(PIXELS)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels_of(encoded(image, icc_profile=srgb)), PIXELS)
    assert np.array_equal(pixels_of(encoded(image, icc_profile=b"no profile")), PIXELS)


GOOD = encoded(Image.fromarray(PIXELS))
CLEAR = Image.new("RGBA", (40, 24), (9, 9, 9, 0))


def with_flipped_byte(data):
    data = bytearray(data)
    data[len(data) // 2] ^= 255
    return bytes(data)


DAMAGED_PICTURES = {
    "picture-empty": b"",
    "picture-unknown-format": b"<svg></svg>",
    "picture-truncated": encoded(smooth(0), "JPEG")[:-400],
    "picture-damaged": with_flipped_byte(GOOD),
    "picture-too-large": encoded(Image.new("L", (3000, 2000))),
    "picture-animated": encoded(
        Image.new("L", (8, 8)), "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 9)]
    ),
    "picture-invisible": encoded(CLEAR),
    "picture-float": encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
    "picture-depth": encoded(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF"),
}


@pytest.mark.parametrize("reason", DAMAGED_PICTURES)
def test_damaged_pictures_are_refused_by_name(reason):
    with pytest.raises(Refused, match=r"^row 3: ") as caught:
        read_picture(DAMAGED_PICTURES[reason], "row 3", max_pixels=1_000_000)
    assert caught.value.reason == reason


def test_a_bomb_is_refused_before_it_is_decoded():
    header = bytearray(encoded(Image.new("1", (64, 64))))
    header[16:24] = (100_000).to_bytes(4, "big") * 2  # width and height, 10^10 pixels
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(Refused) as caught:
        read_picture(bytes(header), "x")
    assert caught.value.reason == "picture-too-large"


def test_buckets_suit_the_patch_keep_the_area_and_go_both_ways():
    sizes = bucket_sizes(512 * 512, 32, 2.0)
    assert (512, 512) in sizes
    for height, width in sizes:
        assert height % 32 == width % 32 == 0
        assert 0.85 * 512 * 512 < height * width <= 512 * 512
        assert (width, height) in sizes
        assert max(height, width) / min(height, width) <= 2.0
    assert nearest_bucket((1000, 1000), sizes) == (512, 512)
    height, width = nearest_bucket((1080, 1920), sizes)
    assert width > height


def test_a_pair_of_two_resolutions_gets_one_crop():
    large = smooth(1, (300, 500))
    small = large.resize((250, 150), Image.Resampling.LANCZOS)
    assert same_shape((300, 500), (150, 250), 0.02)
    assert not same_shape((300, 500), (150, 300), 0.02)
    one, other = (np.asarray(cover(image, (96, 96))).astype(float) for image in (large, small))
    assert np.abs(one - other).mean() < 1.0
    shifted = np.asarray(cover(large.crop((12, 0, 500, 300)), (96, 96))).astype(float)
    assert np.abs(one - shifted).mean() > 3.0  # so little would be noticed


@pytest.mark.parametrize(("size", "reason"), [((30, 90), "picture-too-small"), ((100, 450), "picture-too-narrow")])
def test_odd_shapes_are_refused(size, reason):
    with pytest.raises(Refused) as caught:
        check_shape(size, 64, 4.0, "x")
    assert caught.value.reason == reason


def test_the_hash_knows_a_picture_again_and_tells_others_apart():
    one = smooth(3, (200, 300))
    again = Image.open(io.BytesIO(encoded(one.resize((150, 100)), "JPEG", quality=80)))
    assert (picture_hash(one) ^ picture_hash(again)).bit_count() <= 8
    others = [picture_hash(smooth(seed)) for seed in range(20, 60)]
    assert min((picture_hash(one) ^ other).bit_count() for other in others) > 30
    recoloured = one.copy()
    recoloured.paste((255, 0, 0), (100, 50, 200, 150))
    green = one.copy()
    green.paste((0, 255, 0), (100, 50, 200, 150))
    assert picture_hash(recoloured) != picture_hash(green)
    flat = [picture_hash(Image.new("RGB", (64, 64), colour)) for colour in ((200, 30, 30), (30, 30, 200))]
    assert flat[0] != flat[1]


def test_near_duplicates_are_found_within_the_distance_and_only_there():
    finder = DuplicateFinder(3)
    value = picture_hash(smooth(5))
    assert finder.seen((value,), "", "first") is None
    assert finder.seen((value ^ 0b10000000000000000000101,), "", "near") == "first"
    assert finder.seen((value ^ 0b1111,), "", "far") is None
    assert finder.seen((value,), "another wish", "other text") is None
    assert finder.seen((value, value), "", "a pair") is None
