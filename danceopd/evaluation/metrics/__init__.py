"""What is measured on drawn pictures; every metric is named once, in `METRICS`.

The small world's metrics read a picture back exactly. The others look at sources and targets, some with networks or a
judge that the recipe names (`evaluate.networks`, `evaluate.judge`); without these they are skipped, with a note.
"""

from __future__ import annotations

from danceopd.errors import unknown_name
from danceopd.evaluation.metrics import drawing, editing, fidelity, judged, open_words, small_world, styling
from danceopd.evaluation.metrics.base import MAX_PSNR, Metric, read_picture

__all__ = ["MAX_PSNR", "METRICS", "Metric", "metric", "read_picture"]

METRICS = {
    m.name: m for room in (small_world, open_words, fidelity, drawing, editing, styling, judged) for m in room.METRICS
}


def metric(name: str) -> Metric:
    """A metric by name.

    Raises:
        UserError: if there is none, listing the names.
    """
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    return METRICS[name]
