"""Sample grids while the student trains: the same validation records and noise every time, teacher beside student."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from danceopd.config.recipe import EvaluateRecipe
from danceopd.data.encoded import EncodedRecords
from danceopd.data.records import Record, decode_image
from danceopd.evaluation.grids import picture_grid
from danceopd.evaluation.samplings import Samplings
from danceopd.evaluation.scoring import draw_field
from danceopd.flow.fields import Field

log = logging.getLogger(__name__)


class Previewer:
    """Draws one grid per call: source, teacher, student, target.

    Args:
        records: what to draw, of any tasks.
        encoded: the same records, encoded.
        teachers: frozen fields by name; drawn once, at the first call.
        teacher_of: task -> teacher's name.
        spec: how pictures are drawn.
        folder: where `step-000300.png` and so on appear.
        samplings: how each field is drawn; default: all as `spec` says, and as they are.
    """

    def __init__(
        self,
        records: list[Record],
        encoded: EncodedRecords,
        teachers: dict[str, Field],
        teacher_of: dict[str, str],
        spec: EvaluateRecipe,
        folder: Path,
        samplings: Samplings | None = None,
    ):
        self._samplings = samplings
        self._records, self._encoded, self._spec, self._folder = records, encoded, spec, Path(folder)
        self._teachers, self._teacher_of = teachers, teacher_of
        self._ids = [record.id for record in records]
        self._taught: list[np.ndarray] | None = None

    def __call__(self, student: Field, step: int) -> None:
        if self._taught is None:
            self._taught = self._draw_teachers()
        drawn = self._draw("student", student, self._encoded, self._ids)
        rows = [
            [self._source(record), taught, picture, self._target(record)]
            for record, taught, picture in zip(self._records, self._taught, drawn, strict=True)
        ]
        titles = ["source", "teacher", "student", "target"]
        grid = picture_grid(rows, titles, [record.prompt for record in self._records])
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{step:06d}.png"
        grid.save(path)
        log.info("sample grid %s", path.name)

    def _draw(self, name: str, field: Field, encoded: EncodedRecords, ids: list[str]) -> np.ndarray:
        spec = self._spec
        if self._samplings is not None:
            field, spec = self._samplings.drawn(name, field)
        return draw_field(field, encoded, ids, spec)

    def _draw_teachers(self) -> list[np.ndarray]:
        taught: list[np.ndarray] = [np.empty(0)] * len(self._records)
        for task, rows in self._encoded.rows_by_task().items():
            name, ids = self._teacher_of[task], [self._ids[row] for row in rows]
            drawn = self._draw(name, self._teachers[name], self._encoded.subset(rows), ids)
            for row, picture in zip(rows, drawn, strict=True):
                taught[row] = picture
        return taught

    def _blank(self) -> np.ndarray:
        return np.full((self._encoded.height, self._encoded.width, 3), 255, np.uint8)

    def _source(self, record: Record) -> np.ndarray:
        return self._blank() if record.source is None else decode_image(record.source, record.id)

    def _target(self, record: Record) -> np.ndarray:
        return self._blank() if record.target is None else decode_image(record.target, record.id)
