"""Edits of the whole picture: how near its style comes to the target's, and whether the source's structure is kept."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn import functional

from danceopd.data.records import Record
from danceopd.evaluation.metrics.base import Metric, chunks, image_functions, pictures_of, unit_range
from danceopd.evaluation.metrics.tools import Tools

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def _style_gram(pictures: np.ndarray, records: list[Record], tools: Tools) -> list[float]:
    """Cosine of Gram matrices (Gatys et al., 2016) of centred patch features, averaged over three depths."""
    values: list[float] = []
    for part, theirs in chunks(pictures, records):
        ours, wanted = (tools.clip.grams(p) for p in (part, pictures_of(theirs, "target", part.shape[1:])))
        values += functional.cosine_similarity(ours, wanted, dim=-1).mean(dim=1).tolist()
    return values


def _clip_target(pictures: np.ndarray, records: list[Record], tools: Tools) -> list[float]:
    values: list[float] = []
    for part, theirs in chunks(pictures, records):
        ours, wanted = (tools.clip.images(p) for p in (part, pictures_of(theirs, "target", part.shape[1:])))
        values += (ours * wanted).sum(dim=-1).tolist()
    return values


def _dino_target(pictures: np.ndarray, records: list[Record], tools: Tools) -> list[float]:
    values: list[float] = []
    for part, theirs in chunks(pictures, records):
        ours, wanted = (tools.dino.images(p) for p in (part, pictures_of(theirs, "target", part.shape[1:])))
        values += functional.cosine_similarity(ours, wanted, dim=-1).tolist()
    return values


def _structure_dino(pictures: np.ndarray, records: list[Record], tools: Tools) -> list[float]:
    """1 - mean |S - S'| of the patches' cosine self-similarities, after Splice (Tumanyan et al., 2022)."""
    values: list[float] = []
    for part, theirs in chunks(pictures, records):
        ours, source = (tools.dino.self_similarity(p) for p in (part, pictures_of(theirs, "source", part.shape[1:])))
        values += (1 - (ours - source).abs().mean(dim=(1, 2))).tolist()
    return values


def _structure_ssim(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    ssim = image_functions().structural_similarity_index_measure

    values: list[float] = []
    for part, theirs in chunks(pictures, records):
        ours, source = (edges(unit_range(p)) for p in (part, pictures_of(theirs, "source", part.shape[1:])))
        values += ssim(ours, source, data_range=1.0, reduction="none").tolist()
    return values


def edges(pictures: Tensor) -> Tensor:
    """Strength of the luminance's edges (B, 1, H, W) of pictures (B, 3, H, W) in [0, 1]: Sobel's, scaled to their
    greatest, so that a style that only weakens or strengthens contrast keeps its structure."""
    luma = (pictures * pictures.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    across = pictures.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = (across.expand(1, 1, 3, 3), across.T.expand(1, 1, 3, 3))
    padded = functional.pad(luma, (1, 1, 1, 1), mode="replicate")
    along, down = (functional.conv2d(padded, kernel).square() for kernel in kernels)
    strength = (along + down).sqrt()
    return strength / strength.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)


METRICS = (
    Metric(
        "style_gram",
        "index",
        "likeness of style to the target: cosine of Gram matrices of CLIP's patch features",
        ("target",),
        _style_gram,
        tools=("clip",),
    ),
    Metric(
        "clip_target",
        "index",
        "cosine of CLIP's embeddings of picture and target (CLIP-I)",
        ("target",),
        _clip_target,
        tools=("clip",),
    ),
    Metric(
        "dino_target",
        "index",
        "cosine of DINO's embeddings of picture and target",
        ("target",),
        _dino_target,
        tools=("dino",),
    ),
    Metric(
        "structure_dino",
        "index",
        "likeness of structure to the source: self-similarity of DINO's patches",
        ("source",),
        _structure_dino,
        tools=("dino",),
    ),
    Metric(
        "structure_ssim",
        "index",
        "likeness of structure to the source: SSIM of the luminance's edges, 1 when equal",
        ("source",),
        _structure_ssim,
    ),
)
