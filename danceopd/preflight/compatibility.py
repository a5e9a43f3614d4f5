"""Whether a teacher's pipeline folder speaks the base's language: latent space, scheduler, text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from danceopd.files import hash_file
from danceopd.preflight.findings import Finding
from danceopd.text import read_object

# Keys that say who wrote a file and how, not what is in it.
_ASIDE = {
    "_name_or_path",
    "_diffusers_version",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "force_upcast",
    "sample_size",
}


# A teacher's transformer may be larger or smaller than the base's; these say how it is called.
_INTERFACE = ("_class_name", "in_channels", "out_channels", "patch_size", "joint_attention_dim", "guidance_embeds")


_SMALL = 2**16  # numbers: tensors up to this size are compared in full


def check_pipeline(teacher: str, folder: Path, base: Path) -> list[Finding]:
    """Whether a teacher given as a whole pipeline speaks the base's language: latents, noise levels, prompts.

    Any other folder (a transformer alone, a LoRA, a field folder) has nothing to compare and gives no finding.

    Args:
        teacher: its name.
        folder: the teacher's, as the recipe names it.
        base: the base's pipeline folder.
    """
    folder, base = Path(folder), Path(base)
    if not (folder / "model_index.json").is_file():
        return []
    parts = {
        "vae": ("latent space", "config.json", None),
        "scheduler": ("scheduler", "scheduler_config.json", None),
        "text_encoder": ("text encoder", "config.json", None),
        "transformer": ("latent space", "config.json", _INTERFACE),
    }
    found = []
    for part, (what, file, keys) in parts.items():
        theirs, ours = folder / part / file, base / part / file
        if theirs.is_file() and ours.is_file():
            found += _differing_keys(teacher, what, f"{part}/{file}", read_object(theirs), read_object(ours), keys)
    for part, what, largest in (("vae", "latent space", None), ("text_encoder", "text encoder", _SMALL)):
        name = _differing_tensor(folder / part, base / part, largest)
        if name is not None:
            text = f"teacher {teacher!r}: another {what} than the base: the weights of {part} differ, first {name}"
            found.append(Finding("error", what, text))
    return found


def _differing_keys(
    teacher: str, what: str, file: str, theirs: dict, ours: dict, keys: tuple[str, ...] | None
) -> list[Finding]:
    compared = sorted((set(theirs) | set(ours)) - _ASIDE) if keys is None else keys

    return [
        Finding(
            "error",
            what,
            f"teacher {teacher!r}: another {what} than the base: {file}, {key} is "
            f"{theirs.get(key)!r}, the base has {ours.get(key)!r}",
        )
        for key in compared
        if theirs.get(key) != ours.get(key)
    ]


def _tensors(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor of a component folder."""
    place: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            place |= dict.fromkeys(file.keys(), path)
    return place


def _hashes(place: dict[str, Path]) -> list[str]:
    return [hash_file(path) for path in sorted(set(place.values()))]


def _differing_tensor(theirs: Path, ours: Path, largest: int | None) -> str | None:
    """The first tensor two component folders do not share, up to the rounding of another dtype; None if none."""
    left, right = _tensors(theirs), _tensors(ours)
    if not left or not right:
        return None
    if set(left) != set(right):
        return min(set(left) ^ set(right))
    if largest is None and _hashes(left) == _hashes(right):
        return None
    for name in sorted(left):
        with safe_open(left[name], framework="pt") as a, safe_open(right[name], framework="pt") as b:
            shape = a.get_slice(name).get_shape()
            if shape != b.get_slice(name).get_shape():
                return name
            if largest is not None and torch.Size(shape).numel() > largest:
                continue
            if not torch.allclose(a.get_tensor(name).float(), b.get_tensor(name).float(), rtol=1e-2, atol=1e-5):
                return name
    return None
