"""Drawing: whether a picture shows its caption, and how like real pictures the drawn ones are as a set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from danceopd.data.records import Record
from danceopd.evaluation.metrics.base import Metric, chunks, pictures_of
from danceopd.evaluation.metrics.tools import Tools


def _clip_score(pictures: np.ndarray, records: list[Record], tools: Tools) -> list[float]:
    """Cosine of CLIP's embeddings of picture and prompt (Hessel et al., 2021, without its factor)."""
    values: list[float] = []
    for part, theirs in chunks(pictures, records):
        texts = tools.clip.texts([record.prompt for record in theirs])
        values += (tools.clip.images(part) * texts).sum(dim=-1).tolist()
    return values


class _Features(nn.Module):
    """What torchmetrics takes for a network where the features are there already."""

    def __init__(self, count: int):
        super().__init__()
        self.num_features = count

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(drawn: Tensor, real: Tensor) -> float:
    """Fréchet distance of two sets of features (N, C) and (M, C), as FID takes it (Heusel et al., 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import

    return _compare(FrechetInceptionDistance(feature=_Features(drawn.shape[1])), drawn, real)


def kernel_distance(drawn: Tensor, real: Tensor) -> float:
    """Unbiased squared MMD of two sets of features with KID's cubic kernel (Binkowski et al., 2018), over all of them;
    it is small and may fall below 0."""
    from torchmetrics.image.kid import KernelInceptionDistance  # slow to import

    size = min(len(drawn), len(real))
    metric = KernelInceptionDistance(feature=_Features(drawn.shape[1]), subsets=1, subset_size=size)
    return _compare(metric, drawn, real)


def _compare(metric: Any, drawn: Tensor, real: Tensor) -> float:
    metric.update(real.double().cpu(), real=True)
    metric.update(drawn.double().cpu(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics shuffles the subsets it draws; here there is one, of all
        found = metric.compute()
    return float(found[0] if isinstance(found, tuple) else found)


def _set_distance(tool: str, distance: Callable[[Tensor, Tensor], float]) -> Callable:
    def measure(pictures: np.ndarray, records: list[Record], tools: Tools) -> list[float]:
        network, drawn, real = getattr(tools, tool), [], []
        for part, theirs in chunks(pictures, records):
            drawn.append(network.images(part))
            real.append(network.images(pictures_of(theirs, "target", part.shape[1:])))
        return [-distance(torch.cat(drawn), torch.cat(real))]

    return measure


_BY = {"fid": ("Inception-v3", "inception"), "fd_dino": ("DINO", "dino")}
_KERNEL = {"kid": ("Inception-v3", "inception"), "kd_dino": ("DINO", "dino")}

METRICS = (
    Metric(
        "clip_score",
        "index",
        "cosine of CLIP's embeddings of picture and prompt (papers write it times 100)",
        (),
        _clip_score,
        tools=("clip",),
    ),
    *(
        Metric(
            name,
            "distance",
            f"minus the Fréchet distance to the targets' {of} features; few records make it large",
            ("target",),
            _set_distance(tool, frechet_distance),
            tools=(tool,),
            of_set=True,
        )
        for name, (of, tool) in _BY.items()
    ),
    *(
        Metric(
            name,
            "distance",
            f"minus the squared kernel distance (MMD) to the targets' {of} features",
            ("target",),
            _set_distance(tool, kernel_distance),
            tools=(tool,),
            of_set=True,
        )
        for name, (of, tool) in _KERNEL.items()
    ),
)
