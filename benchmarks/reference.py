"""The authors' release (github.com/worldbench/DanceOPD, 0.2) from a checkout, on the benchmark's own transformer.

Its package is called `danceopd` too, so it lives in a process of its own (`reference_worker.py`), which waits between
updates until it is asked for the next.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from danceopd.backbones.bases import shipped_folder
from danceopd.data import world
from danceopd.errors import UserError

if TYPE_CHECKING:
    from benchmarks.setting import Setting

WORKER = Path(__file__).with_name("reference_worker.py")
NEEDED = ("danceopd/core/engine.py", "danceopd/core/routing.py", "danceopd/backends/zimage_diffsynth.py")


class Reference:
    """The release's training loop, an update at a time. Use as a context manager.

    Args:
        checkout: folder of the release.
        setting: whose transformer, teachers, records and sampling grid it gets.
        batch: samples per update, a multiple of the number of tasks.

    Raises:
        UserError: if the folder holds no such release, or its process ends.
    """

    def __init__(self, checkout: Path, setting: Setting, batch: int):
        missing = [name for name in NEEDED if not (checkout / name).is_file()]
        if missing:
            raise UserError(
                f"--reference {checkout}: no {missing[0]}; give a checkout of worldbench/DanceOPD, release 0.2"
            )
        self._checkout, self._setting, self._batch = checkout.resolve(), setting, batch
        self.held = 0

    def __enter__(self) -> Reference:
        self._scratch = tempfile.TemporaryDirectory(prefix="reference-")
        folder = Path(self._scratch.name)
        try:
            self._write(folder)
            command = [sys.executable, str(WORKER), str(folder)]
            environment = os.environ | {"PYTHONPATH": str(self._checkout)}
            self._errors = open(folder / "stderr", "w+")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=folder,
                env=environment,
            )
            self.held = int(self._answer())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            process.stdin.close()
            process.terminate()
            process.wait()
            process.stdout.close()
            self._errors.close()
        self._scratch.cleanup()

    def update(self, number: int) -> None:
        """One batch: an optimizer step of batch / 3 samples on each task's route in turn."""
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are on stderr
        self._answer()

    def _answer(self) -> str:
        while line := self._process.stdout.readline():
            if line.startswith("worker:"):
                return line.removeprefix("worker:").strip()
        self._errors.flush()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines() or ["no word"]
        raise UserError(f"--reference {self._checkout}: its process ended ({last[-1]})")

    def _write(self, folder: Path) -> None:
        setting = self._setting
        setting.bare.save_pretrained(folder / "transformer")
        setting.export_teachers(folder / "teachers")
        with open(folder / "prompts.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["task", "prompt", "source_image"])
            for number, record in enumerate(setting.records):
                source = ""
                if record.source is not None:
                    source = f"source-{number}.png"
                    (folder / source).write_bytes(record.source)
                table.writerow([record.task, record.prompt, source])
        model = setting.backbone.settings
        tasks = {task: any(r.source is not None for r in setting.records if r.task == task) for task in world.TASKS}
        job = {
            "pipeline": str(shipped_folder("world")),
            "grid": setting.grid.tolist(),
            "tokens": list(setting.backbone.latent_shape(model.height, model.width)),
            "height": model.height,
            "width": model.width,
            "max_sequence_length": model.max_sequence_length,
            "text_encoder_out_layers": list(model.text_encoder_out_layers),
            "rank": setting.rank,
            "targets": setting.backbone.lora_targets,
            "lr": setting.learner.spec.lr,
            "batch": self._batch,
            "tasks": tasks,
            "teacher_of": setting.distillation.teacher_of,
            "threads": torch.get_num_threads(),
        }
        (folder / "job.json").write_text(json.dumps(job))
