"""Two velocity fields into one student, in less than a minute of CPU time: python examples/distill_two_fields.py

One teacher is the base that ships with the package: it draws captions. The other is fine-tuned here: it turns a
picture into night, and has lost the drawing. The student learns both from them, and sees no target picture.
"""

import sys
from pathlib import Path

import danceopd
from danceopd.config.recipe import DistillRecipe, EvaluateRecipe, FinetuneRecipe
from danceopd.data.records import decode_image
from danceopd.data.world import world_records
from danceopd.evaluation.grids import picture_grid

# A tiny FLUX.2-klein with its autoencoder, text encoder and tokenizer.
settings = danceopd.load_recipe("world").model
base = danceopd.fetch_base(settings.base, None, Path("runs"))
backbone = danceopd.load_backbone(base.folder, settings)

# Records of two tasks. What networks read of them are the encodings: prompt embeddings and latents.
sizes = {"t2i": {"train": 256, "test": 3}, "global_style": {"train": 1024, "test": 14}}
records = [r for r in world_records(sizes) if r.task == "t2i" or '"style": "night"' in r.provenance]
train, held_out = ([r for r in records if r.split == split] for split in ("train", "test"))


def encode(some, targets=False):
    """Encodings of records, with or without their target pictures."""
    return danceopd.encode_records(backbone, some, settings.height, settings.width, None, base.digest, targets)


# Two teachers. Fine-tuning needs pairs of pictures.
training = {"optimizer": "muon", "lr": 0.04, "batch": 8, "warmup": 10}
draws = danceopd.VelocityField("draws", backbone, backbone.transformer)
pairs = encode([r for r in train if r.task == "global_style"], targets=True)
darkens, _ = danceopd.finetune_field(backbone, "darkens", pairs, FinetuneRecipe(steps=80, **training))

# One student. Each sample asks its own task's teacher, once, on the student's own path.
teachers, routing = {"draws": draws, "darkens": darkens}, {"t2i": "draws", "global_style": "darkens"}
recipe = DistillRecipe(steps=60, rollout_steps=8, window="semantic", **training)
student, _ = danceopd.distill_fields(backbone, encode(train), teachers, routing, dict.fromkeys(routing, 1.0), recipe)

# One picture: what each field makes of records that none has seen.
fields, seen = [draws, darkens, student], encode(held_out)
columns = [[r.source and decode_image(r.source, r.id) for r in held_out]]
columns += [danceopd.draw_field(field, seen, [r.id for r in held_out], EvaluateRecipe()) for field in fields]
picture = picture_grid(
    [list(row) for row in zip(*columns, strict=True)],
    column_titles=["source", *(field.name for field in fields)],
    row_titles=[r.prompt for r in held_out],
)
picture.save(sys.argv[1] if len(sys.argv) > 1 else "two_fields.png")
