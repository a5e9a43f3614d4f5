"""The step that brings the base model to where every later step can read it."""

from __future__ import annotations

import shutil
from pathlib import Path

from danceopd.backbones.bases import hash_encoders
from danceopd.backbones.hashes import hash_weights
from danceopd.config.recipe import Recipe
from danceopd.files import write_json
from danceopd.tracking import recording
from danceopd.workspace import Product, main_first, make_product, portable


def resolve_base(recipe: Recipe, workspace: Path) -> Product:
    """Bring the base's pipeline folder to where every later step can read it.

    Raises:
        UserError: if it cannot be found, or the shipped one is damaged.
    """
    from danceopd.backbones.bases import fetch_base, fetch_weights

    model, workspace = recipe.model, Path(workspace)
    inputs, other = [], None
    with main_first():  # it downloads and hashes; the others find both
        source = fetch_base(model.base, model.revision, workspace)
        inputs += [source.digest, portable(source.folder, workspace)]
        if model.transformer is not None:
            other = fetch_weights(model.transformer, workspace, "model.transformer")
            inputs += [hash_weights(other, workspace), model.dtype]

    def build(scratch: Path, checkpoints: Path) -> dict:
        settings = {"model": recipe.model.model_dump(mode="json")}
        recording.begin(recipe, workspace, checkpoints.name, f"base {source.name}", settings)
        if other is not None:
            _join_transformer(recipe, source.folder, other, scratch / "pipeline")
        elif source.shipped:
            shutil.copytree(source.folder, scratch / "pipeline")
        name = "pipeline" if source.shipped or other is not None else portable(source.folder, workspace)
        # A base that stays where it is leaves nothing else here to tell its product's digest from another's.
        write_json(scratch / "source.json", {"weights": source.digest})
        facts = {"pipeline": name, "base": recipe.model.base, "weights": source.digest}
        return facts | {"encoders": hash_encoders(source.folder, workspace)}

    return make_product(workspace, "base", source.name, inputs, build)


def _join_transformer(recipe: Recipe, base: Path, weights: Path, folder: Path) -> None:
    """A base's pipeline folder with other weights for its transformer."""
    from danceopd.backbones import load_backbone

    backbone = load_backbone(base, recipe.model.model_copy(update={"quantize": None, "attention": "native"}), "cpu")
    backbone.save(folder, backbone.new_transformer(weights))
