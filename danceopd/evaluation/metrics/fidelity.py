"""How near a picture comes to its target: PSNR, SSIM, LPIPS."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from danceopd.data.records import Record
from danceopd.evaluation.metrics.base import MAX_PSNR, Metric, chunks, image_functions, pictures_of, unit_range
from danceopd.evaluation.metrics.tools import Tools


def _against_targets(
    pictures: np.ndarray, records: list[Record], compare: Callable[[Tensor, Tensor], Tensor]
) -> list[float]:
    values: list[float] = []
    for part, theirs in chunks(pictures, records):
        values += compare(unit_range(part), unit_range(pictures_of(theirs, "target", part.shape[1:]))).tolist()
    return values


def _psnr(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    psnr = image_functions().peak_signal_noise_ratio

    def compare(drawn: Tensor, wanted: Tensor) -> Tensor:
        value = psnr(drawn, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))
        return value.clamp(0, MAX_PSNR)

    return _against_targets(pictures, records, compare)


def _ssim(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    ssim = image_functions().structural_similarity_index_measure

    def compare(drawn: Tensor, wanted: Tensor) -> Tensor:
        return ssim(drawn, wanted, data_range=1.0, reduction="none")

    return _against_targets(pictures, records, compare)


def _lpips(pictures: np.ndarray, records: list[Record], tools: Tools) -> list[float]:
    return _against_targets(pictures, records, lambda drawn, wanted: -tools.lpips.distance(drawn, wanted))


METRICS = (
    Metric("psnr", "dB", "PSNR to the target over the whole picture, at most 60 dB", ("target",), _psnr),
    Metric("ssim", "index", "structural similarity to the target, 1 when equal", ("target",), _ssim),
    Metric(
        "lpips",
        "distance",
        "minus LPIPS (AlexNet) to the target: 0 when equal, lower the more a person would see",
        ("target",),
        _lpips,
        tools=("lpips",),
    ),
)
