"""Runs inside the authors' release: `danceopd` below is THEIR package. Started by `reference.py`, never imported.

Their engine, router, data, rollout, loss and optimizer step run as they are; the back end derives from their Z-Image
one and only says what is particular to another transformer: how it is loaded, called, and how prompts and sources are
encoded. Two settings make it fair: routes take turns instead of being drawn, and activations are not computed again.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig

from danceopd.backends.teacher import compose_teacher
from danceopd.backends.zimage_diffsynth import ZImageBackend
from danceopd.core import engine
from danceopd.core.config import Config, apply_overrides, load_config
from danceopd.core.routing import WeightedRouter


def say(word: object) -> None:
    print(f"worker: {word}", flush=True)


class Flux2Backend(ZImageBackend):
    """Their training on a FLUX.2-klein transformer."""

    def __init__(self, cfg: Config, accelerator, job: dict, folder: Path):
        super().__init__(cfg, accelerator)
        self.job, self.folder, self.waited = job, folder, 0

    def prepare(self) -> None:
        transformer = Flux2Transformer2DModel.from_pretrained(str(self.folder / "transformer"))
        self.pipe = Flux2KleinPipeline.from_pretrained(self.job["pipeline"], transformer=transformer)
        for module in (self.pipe.vae, self.pipe.text_encoder, transformer):
            module.requires_grad_(False).eval()
        template = copy.deepcopy(transformer)
        rank = self.job["rank"]
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=self.job["targets"]))
        for teacher in self.cfg.teachers:
            self.teachers[teacher["name"]] = compose_teacher(
                copy.deepcopy(template), teacher, label=teacher["name"], log=lambda text: None, device=self.device
            )
        self.trainable_params = [p for p in transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable_params, lr=float(self.cfg.training.lr))
        self.student, self.optimizer = self.accelerator.prepare(transformer, self.optimizer)
        networks = [self.student, *self.teachers.values()]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for n in networks
            for t in (*n.parameters(), *n.buffers())
        }
        say(sum(storages.values()))
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit(0)

    @torch.no_grad()
    def _encode_prompt(self, prompt: str, edit_image=None) -> torch.Tensor:
        return self.pipe._get_qwen3_prompt_embeds(
            self.pipe.text_encoder,
            self.pipe.tokenizer,
            [prompt],
            max_sequence_length=self.job["max_sequence_length"],
            hidden_states_layers=self.job["text_encoder_out_layers"],
        )

    @torch.no_grad()
    def _encode_source_image(self, image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image.resize((self.job["width"], self.job["height"]))))
        pixels = pixels.permute(2, 0, 1)[None].to(self.torch_dtype) / 127.5 - 1
        return self.pipe._pack_latents(self.pipe._encode_vae_image(pixels, generator=None))

    def _latent_shape(self) -> tuple[int, ...]:
        return (1, *self.job["tokens"])

    def _timesteps(self) -> torch.Tensor:
        return torch.tensor(self.job["grid"]) * 1000

    def _velocity(self, model, latents, timestep, prompt_embeds, image_latents=None) -> torch.Tensor:
        side = round(latents.shape[1] ** 0.5)
        picture = torch.empty(1, latents.shape[2], side, side)
        ids, tokens = self.pipe._prepare_latent_ids(picture), latents
        if image_latents:
            ids = torch.cat([ids, self.pipe._prepare_image_ids([picture])], dim=1)
            tokens = torch.cat([latents, *image_latents], dim=1)
        output = model(
            hidden_states=tokens,
            timestep=timestep.reshape(1) / 1000,
            guidance=None,
            encoder_hidden_states=prompt_embeds,
            txt_ids=self.pipe._prepare_text_ids(prompt_embeds),
            img_ids=ids,
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]

    def optimizer_step(self) -> None:
        super().optimizer_step()
        self.waited += 1
        if self.waited % len(self.job["tasks"]) == 0:
            say("done")
            self._wait()

    def save(self, step: int) -> None:
        pass


def configuration(job: dict, folder: Path) -> Config:
    cfg = apply_overrides(
        load_config(None),
        [
            "backend=zimage",
            f"data.prompts_csv={folder / 'prompts.csv'}",
            f"training.output_dir={folder / 'out'}",
            "training.mixed_precision='no'",
            f"training.rollout_steps={len(job['grid']) - 1}",
            f"training.lr={job['lr']}",
            f"training.grad_accum={job['batch'] // len(job['tasks'])}",
            "training.max_train_steps=1000000",
            "training.save_steps=1000000",
            "training.log_every=1000000",
            "model.model_paths=transformer",
            "student.init=base",
        ],
    )
    cfg.teachers = [{"name": n, "lora_dir": str(folder / "teachers" / n)} for n in job["teacher_of"].values()]
    cfg.routing.routes = [
        {"teacher": job["teacher_of"][task], "dataset": task, "requires_source_image": needs}
        for task, needs in job["tasks"].items()
    ]
    return cfg


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    turns: dict[int, itertools.cycle] = {}
    WeightedRouter.sample = lambda self: next(turns.setdefault(id(self), itertools.cycle(self.routes)))
    engine.build_backend = lambda cfg, accelerator: Flux2Backend(cfg, accelerator, job, folder)
    engine.DanceOPDEngine(configuration(job, folder)).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
