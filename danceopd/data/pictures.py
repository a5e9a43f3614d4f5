"""Picture bytes of any kind a data set holds, as upright 8-bit RGB; what cannot be shown is refused by name.

Handled: EXIF orientation, transparency (composited over a colour), palettes, gray, 16 bits per channel, CMYK and
wide-gamut RGB with an ICC profile. Refused, each with its own reason: empty, truncated, damaged, animated, oversized
(decompression bombs), wholly transparent pictures, and formats outside `FORMATS`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from danceopd.errors import UserError

# Raster formats that decode without another program; Pillow would hand others (EPS) to one.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 64_000_000
WHITE = (255, 255, 255)
_SRGB = ImageCms.createProfile("sRGB")
_EXIF_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)  # orientations that turn a picture by a quarter


class Refused(UserError):
    """One picture or row that is not taken, with the short name of the reason (`picture-truncated`)."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        image: upright, mode RGB.
        changed: whether anything but the codec was applied; if not, the original bytes show the very same pixels.
    """

    image: Image.Image
    changed: bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image.height, self.image.width


def read_picture(data: bytes, where: str, matte: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode picture bytes.

    Args:
        data: the file's bytes.
        where: named in errors.
        matte: RGB colour that shows through where the picture is transparent.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        Refused: naming `where` and the reason.
    """
    if not data:
        raise Refused("picture-empty", f"{where}: not a readable image (it has no bytes); export it again")
    Image.init()  # where formats are named, Pillow does not look for their plugins by itself
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _decode(image, where, matte, max_pixels)
    except Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(where, "far too many pixels", max_pixels) from error
    except UnidentifiedImageError as error:
        raise Refused(
            "picture-unknown-format",
            f"{where}: not a readable image (none of {', '.join(FORMATS)}); re-export it as PNG or JPEG",
        ) from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        text = " ".join(str(error).split()) or type(error).__name__
        short = "truncated" in text.lower() or isinstance(error, EOFError)
        reason, kind = ("picture-truncated", "cut short") if short else ("picture-damaged", "damaged")
        raise Refused(
            reason, f"{where}: not a readable image ({kind}: {text}); fetch it again or re-export it as PNG or JPEG"
        ) from error


def read_size(data: bytes, where: str) -> tuple[int, int]:
    """(height, width) of a picture as `read_picture` gives it, from its header alone.

    Raises:
        Refused: naming `where`, if there is no such header.
    """
    Image.init()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            lying = image.getexif().get(_EXIF_ORIENTATION, 1) in _LYING
            return (image.width, image.height) if lying else (image.height, image.width)
    except Exception:  # what is wrong with it, decoding tells
        return read_picture(data, where).size


def _too_large(where: str, found: str, limit: int) -> Refused:
    return Refused(
        "picture-too-large", f"{where}: not a readable image ({found}, at most {limit} are decoded); make it smaller"
    )


def _decode(image: Image.Image, where: str, matte: tuple[int, int, int], max_pixels: int) -> Picture:
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(where, f"{height}x{width} pixels", max_pixels)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG with previews behind the photograph
        raise Refused("picture-animated", f"{where}: has {frames} frames; take one of them as the picture")
    image.load()
    plain = image.mode == "RGB" and "transparency" not in image.info
    upright = image.getexif().get(_EXIF_ORIENTATION, 1) == 1
    turned = image if upright else ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    rgb = _to_rgb(turned, where, matte, profile)
    return Picture(rgb.copy() if rgb is image else rgb, changed=not (plain and upright and rgb is image))


def _to_rgb(image: Image.Image, where: str, matte: tuple[int, int, int], profile: bytes | None) -> Image.Image:
    if image.mode == "F":
        raise Refused("picture-float", f"{where}: holds floating-point values without a range; re-export it as 8 bit")
    if image.mode.startswith("I"):  # 16 bits per channel, in whichever byte order Pillow found
        deep = np.asarray(image).astype(np.int64)
        if deep.min(initial=0) < 0 or deep.max(initial=0) > 65535:
            raise Refused("picture-depth", f"{where}: has more than 16 bits per channel; re-export it as 8 or 16 bit")
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _over(image.convert("RGBA"), where, matte)
    if profile and image.mode in ("RGB", "CMYK") and (managed := _to_srgb(image, profile)) is not None:
        return managed
    return image if image.mode == "RGB" else image.convert("RGB")


def _over(image: Image.Image, where: str, matte: tuple[int, int, int]) -> Image.Image:
    if image.getchannel("A").getextrema()[1] == 0:
        raise Refused("picture-invisible", f"{where}: is transparent everywhere; there is nothing to see in it")
    ground = Image.new("RGBA", image.size, (*matte, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The picture in sRGB by its ICC profile; None where the profile is sRGB already or cannot be used."""
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(found).lower():
            return None
        return ImageCms.profileToProfile(image, found, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
