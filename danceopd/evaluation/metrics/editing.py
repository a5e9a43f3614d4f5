"""Local edits: what happened inside the edit's region, and what was left alone outside it.

The region is the record's own where its provenance has one: `mask`, a picture as base64 text, light where the edit goes
(at least 128 of 255), or `box`, [left, top, right, bottom] as shares of width and height. Else it is where source and
target differ by more than `THRESHOLD` in some channel: enough for JPEG's noise to stay below. Specks that a 3x3 square
does not fit into are dropped, and the region is grown by a 64th of the shorter side, to take in soft edges and shadows.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from danceopd.data.records import Record
from danceopd.errors import UserError
from danceopd.evaluation.metrics.base import MAX_PSNR, Metric, image_functions, picture_of, read_picture
from danceopd.evaluation.metrics.tools import Tools

THRESHOLD = 16  # of 255


def edit_mask(record: Record, height: int, width: int) -> np.ndarray:
    """Where a record's edit goes, (height, width) bool.

    Raises:
        UserError: naming the record, if its region cannot be read, is empty, or leaves nothing outside.
    """
    facts = record.facts()
    if facts.get("mask") is not None:
        mask = _given_mask(record, facts["mask"], height, width)
    elif facts.get("box") is not None:
        mask = _given_box(record, facts["box"], height, width)
    else:
        mask = _derived(record, height, width)
    if not mask.any() or mask.all():
        found = "no pixel" if not mask.any() else "every pixel"
        raise UserError(
            f"record {record.id!r}: its edit covers {found}, so inside and outside cannot be told apart; "
            "remove it, give its provenance a 'box', or measure this task by psnr or ssim"
        )
    return mask


def _given_mask(record: Record, text: Any, height: int, width: int) -> np.ndarray:
    where = f"record {record.id!r}, provenance 'mask'"
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise UserError(f"{where}: not base64 text of a picture") from error
    return read_picture(data, height, width, where).max(axis=-1) >= 128


def _given_box(record: Record, box: Any, height: int, width: int) -> np.ndarray:
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
    if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise UserError(
            f"record {record.id!r}, provenance 'box': is {str(box)[:60]}; write [left, top, right, bottom] "
            "as shares of width and height, each from 0 to 1"
        )
    left, top, right, bottom = box
    mask = np.zeros((height, width), dtype=bool)
    mask[int(top * height) : int(np.ceil(bottom * height)), int(left * width) : int(np.ceil(right * width))] = True
    return mask


def _derived(record: Record, height: int, width: int) -> np.ndarray:
    source, target = (picture_of(record, field, (height, width)).astype(int) for field in ("source", "target"))
    changed = np.abs(source - target).max(axis=-1) > THRESHOLD
    grown = max(1, min(height, width) // 64)
    return ndimage.binary_dilation(ndimage.binary_opening(changed, np.ones((3, 3))), iterations=grown)


def _edit_change(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    values = []
    for picture, record in zip(pictures, records, strict=True):
        mask, source = edit_mask(record, *picture.shape[:2]), picture_of(record, "source", picture.shape)
        moved = np.abs(picture.astype(int) - source.astype(int)).max(axis=-1) > THRESHOLD
        values.append(float(moved[mask].mean()))
    return values


def _edit_match(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    values = []
    for picture, record in zip(pictures, records, strict=True):
        mask = edit_mask(record, *picture.shape[:2])
        inside = [
            p[mask].astype(np.float64)
            for p in (picture, *(picture_of(record, f, picture.shape) for f in ("source", "target")))
        ]
        drawn, source, target = inside
        left, whole = np.square(drawn - target).mean(), np.square(source - target).mean()
        values.append(float(left == 0) if whole == 0 else max(0.0, 1 - left / whole))
    return values


def _outside_psnr(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    values = []
    for picture, record in zip(pictures, records, strict=True):
        outside = ~edit_mask(record, *picture.shape[:2])
        values.append(psnr_over(outside, picture, picture_of(record, "source", picture.shape)))
    return values


def psnr_over(pixels: np.ndarray, picture: np.ndarray, wanted: np.ndarray) -> float:
    psnr = image_functions().peak_signal_noise_ratio

    ours, theirs = (torch.from_numpy(p[pixels]).float() / 255 for p in (picture, wanted))
    return psnr(ours, theirs, data_range=1.0).clamp(0, MAX_PSNR).item()


def _preserved_psnr(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    values = []
    for picture, record in zip(pictures, records, strict=True):
        source, target = (picture_of(record, field, picture.shape) for field in ("source", "target"))
        outside = (source == target).all(axis=-1)
        if not outside.any():
            raise UserError(
                f"record {record.id!r}: metric 'preserved_psnr' finds no pixel that source and target "
                "share; measure this task by psnr or ssim, or by outside_psnr"
            )
        values.append(psnr_over(outside, picture, target))
    return values


METRICS = (
    Metric(
        "preserved_psnr",
        "dB",
        "PSNR to the target over the pixels that source and target share, at most 60 dB",
        ("source", "target"),
        _preserved_psnr,
    ),
    Metric(
        "outside_psnr",
        "dB",
        "PSNR to the source outside the edit's region, at most 60 dB",
        ("source", "mask"),
        _outside_psnr,
    ),
    Metric(
        "edit_change",
        "index",
        "share of the edit's region that differs visibly from the source; not whether rightly",
        ("source", "mask"),
        _edit_change,
    ),
    Metric(
        "edit_match",
        "index",
        "how far the edit's region went from source (0) to target (1), by squared error",
        ("source", "target", "mask"),
        _edit_match,
    ),
)
