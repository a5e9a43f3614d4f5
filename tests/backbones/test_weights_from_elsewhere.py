"""LoRA files and checkpoints of other programs: on every family the same velocity as ours, or a line on why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import base_field, condition_of, noise_of, with_lora
from tiny_models import FAMILIES, FLUX2, QWEN_IMAGE, SD3, Z_IMAGE

from danceopd.backbones import load_backbone
from danceopd.backbones.lora import CONFIG, save_diffusers_lora, save_lora
from danceopd.errors import UserError
from danceopd.export.lora_files import save_comfyui_lora
from danceopd.files import read_json, write_json
from danceopd.flow.field_io import field_kind, load_field, save_field
from danceopd.flow.fields import VelocityField

STRENGTH = 1.5  # alpha 3 over rank 2, as `with_lora` makes them


@pytest.fixture(scope="module")
def loaded() -> dict:
    """The bases that tests of this file share, by family."""
    return {}


@pytest.fixture
def bases(folder_of, loaded):
    """family -> a loaded base for LoRAs, which go with the test; its own weights stay as they are."""

    def base(family):
        if family.name not in loaded:
            loaded[family.name] = load_backbone(folder_of(family), family.shape())
        return loaded[family.name]

    yield base
    for one in loaded.values():  # each slows every forward pass down
        one.transformer.delete_adapters(list(getattr(one.transformer, "peft_config", {})))


def velocity(field):
    base = field.backbone
    condition = condition_of(base, ["a red ring", ""], None, 64, 64)
    with torch.no_grad():
        return field(noise_of(base, 2), torch.tensor([0.8, 0.3]), condition)


def diffusers_file(base, name, folder: Path) -> Path:
    return save_diffusers_lora(base.transformer, name, folder)


def comfyui_file(base, name, folder: Path) -> Path:
    """Original names where the family has others than diffusers; strength multiplied in."""
    if base.settings.backbone in (FLUX2.name, SD3.name):
        return save_comfyui_lora(base.transformer, name, folder)
    state = load_file(diffusers_file(base, name, folder / "plain"))
    state = {
        key.replace("transformer.", "diffusion_model.", 1): value * (STRENGTH if "lora_B" in key else 1)
        for key, value in state.items()
    }
    save_file(state, folder / "comfyui.safetensors")
    return folder / "comfyui.safetensors"


def kohya_file(base, name, folder: Path) -> Path:
    """Names in one word, and an alpha beside each pair."""
    state = {}
    for key, value in load_file(comfyui_file(base, name, folder)).items():
        module, _, part = key.removeprefix("diffusion_model.").partition(".lora_")
        word = "lora_unet_" + module.replace(".", "_")
        rank = float(value.shape[0] if part == "A.weight" else value.shape[1])
        state[f"{word}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = value / (1 if part == "A.weight" else 2)
        state[f"{word}.alpha"] = torch.tensor(2 * rank)
    save_file(state, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def comfyui_alpha_file(base, name, folder: Path) -> Path:
    """ComfyUI's names with down, up and an alpha."""
    state = {}
    for key, value in load_file(comfyui_file(base, name, folder)).items():
        module, _, part = key.partition(".lora_")
        rank = float(value.shape[0] if part == "A.weight" else value.shape[1])
        state[f"{module}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = value / (
            1 if part == "A.weight" else 2
        )
        state[f"{module}.alpha"] = torch.tensor(2 * rank)
    save_file(state, folder / "alpha.safetensors")
    return folder / "alpha.safetensors"


def diffusers_alpha_file(base, name, folder: Path) -> Path:
    """Diffusers' names with an alpha beside each pair, and no header."""
    state = load_file(diffusers_file(base, name, folder / "plain"))
    alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(3.0) for key in state if "lora_A" in key}
    save_file(state | alphas, folder / "alpha.safetensors")
    return folder / "alpha.safetensors"


def onetrainer_file(base, name, folder: Path) -> Path:
    """Diffusers' names in one word after `lora_transformer_`, with down, up and alpha."""
    state = {}
    for key, value in load_file(diffusers_file(base, name, folder / "plain")).items():
        module, _, part = key.removeprefix("transformer.").partition(".lora_")
        word = f"lora_transformer_{module.replace('.', '_')}"
        state[f"{word}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = value
        state[f"{word}.alpha"] = torch.tensor(3.0)
    save_file(state, folder / "onetrainer.safetensors")
    return folder / "onetrainer.safetensors"


LAYOUTS = (
    "comfyui_file",
    "comfyui_alpha_file",
    "kohya_file",
    "diffusers_file",
    "diffusers_alpha_file",
    "onetrainer_file",
)


def peft_folder(base, name, folder: Path) -> Path:
    save_lora(base.transformer, name, folder)
    return folder


KINDS = [(family, make) for family in FAMILIES for make in (peft_folder, *(globals()[name] for name in LAYOUTS))]


@pytest.mark.parametrize(("family", "make"), KINDS, ids=[f"{f.name}-{m.__name__}" for f, m in KINDS])
def test_a_lora_of_any_layout_gives_its_own_velocity(bases, family, make, tmp_path):
    base = bases(family)
    own = f"{family.name}_{make.__name__}"
    field = with_lora(base, own)
    (tmp_path / "plain").mkdir()
    path = make(base, own, tmp_path)
    assert field_kind(path) == "lora"
    again = load_field(base, f"{own}_again", path)
    wanted, bare = velocity(field), velocity(base_field(base))
    assert (wanted - bare).abs().max() > 1e-2
    torch.testing.assert_close(velocity(again), wanted, atol=1e-4, rtol=1e-4)
    assert not any(
        p.requires_grad or p.dtype != torch.float32
        for key, p in base.transformer.named_parameters()
        if f".{again.adapter}." in key
    )
    save_field(again, tmp_path / "field")  # as a teacher's product is kept
    kept = load_field(base, f"{own}_kept", tmp_path / "field")
    torch.testing.assert_close(velocity(kept), wanted, atol=1e-4, rtol=1e-4)


def sd3_kohya(changes):
    """A kohya file's tensors, of one rank-1 change (out, in) a module; half its strength is in the alpha."""
    state = {}
    for module, (up, down) in changes.items():
        state |= {
            f"lora_unet_{module}.lora_up.weight": up,
            f"lora_unet_{module}.lora_down.weight": down,
            f"lora_unet_{module}.alpha": torch.tensor(0.5),
        }
    return state


def test_sd3s_modulations_are_turned_round_where_diffusers_has_them_so(bases, tmp_path):
    base = bases(SD3)
    named = {
        "joint_blocks_0_x_block_adaLN_modulation_1": ("transformer_blocks.0.norm1", False),
        "joint_blocks_0_context_block_adaLN_modulation_1": ("transformer_blocks.0.norm1_context", False),
        "joint_blocks_1_context_block_adaLN_modulation_1": ("transformer_blocks.1.norm1_context", True),
        "final_layer_adaLN_modulation_1": ("norm_out", True),
    }
    changed, changes = base.new_transformer(), {}
    for seed, (word, (module, turned)) in enumerate(named.items()):
        weight = changed.get_submodule(f"{module}.linear").weight
        draw = torch.Generator().manual_seed(seed)
        up, down = (torch.randn(shape, generator=draw) for shape in ((len(weight), 1), (1, weight.shape[1])))
        changes[word] = (up, down)
        halves = up.chunk(2)
        weight.data += 0.5 * (torch.cat(halves[::-1]) if turned else up) @ down
    encoder = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(2, 1)}
    save_file(sd3_kohya(changes) | encoder, tmp_path / "lora.safetensors")
    field = load_field(base, "modulations", tmp_path / "lora.safetensors")
    wanted = velocity(VelocityField("changed", base, changed))
    torch.testing.assert_close(velocity(field), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - velocity(base_field(base))).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            sd3_kohya({"double_blocks_0_img_attn_qkv": (torch.zeros(3, 1), torch.zeros(1, 1))}),
            "(no LoRA|nothing) that StableDiffusion3Pipeline knows.*double_blocks_0_img_attn_qkv",
        ),
        (
            {"diffusion_model.final_layer.linear.lora_A.weight": torch.zeros(1, 32)},
            r"diffusion_model\.final_layer\.linear has no B \(up\); half a LoRA changes nothing",
        ),
        (sd3_kohya({"final_layer_linear": (torch.zeros(9, 1), torch.zeros(1, 32))}), "gives 9 features, the base has"),
    ],
)
def test_an_sd3_lora_that_does_not_fit_is_named(bases, state, message, tmp_path):
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message):
        load_field(bases(SD3), "wrong", tmp_path / "lora.safetensors")


def lora_state(base, tmp_path):
    with_lora(base, f"made{len(base.transformer.peft_config) if hasattr(base.transformer, 'peft_config') else 0}")
    name = list(base.transformer.peft_config)[-1]
    return load_file(diffusers_file(base, name, tmp_path / "made"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, "ranks"])
def test_a_lora_of_few_bits_or_several_ranks_is_read(bases, dtype, tmp_path):
    base = bases(FLUX2)
    state = lora_state(base, tmp_path)
    if dtype == "ranks":  # every other module has its second rank taken away
        modules = sorted({key.partition(".lora_")[0] for key in state})[::2]
        for key in [k for k in state if k.partition(".lora_")[0] in modules]:
            state[key] = (state[key][:1] if "lora_A" in key else state[key][:, :1]).contiguous()
        same = {k: v if k.partition(".lora_")[0] not in modules else padded(k, v) for k, v in state.items()}
    else:
        state = {key: value.to(dtype) for key, value in state.items()}
        same = {key: value.float() for key, value in state.items()}
    fields = []
    for name, tensors in (("given", state), ("plain", same)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        fields.append(
            velocity(load_field(base, f"{name}_{str(dtype).rpartition('.')[-1]}", tmp_path / f"{name}.safetensors"))
        )
    assert (fields[0] - velocity(base_field(base))).abs().max() > 1e-3
    torch.testing.assert_close(*fields, atol=1e-5, rtol=1e-5)


def padded(key, value):
    """A half of rank 1 as one of rank 2, whose second part does nothing."""
    return torch.cat([value, torch.zeros_like(value)], dim=0 if "lora_A" in key else 1)


def wide(state):
    key = next(k for k in state if "lora_A" in k)
    return state | {key: torch.zeros(2, 7)}


def without(state, half):
    """One half of one pair is gone."""
    return {k: v for k, v in state.items() if k != next(key for key in state if half in key)}


def spoilt(state, number):
    key = list(state)[-1]
    value = state[key].clone()
    value[0, 0] = number
    return state | {key: value}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_part_of_a_file_is_left_out(bases, family, layout, tmp_path):
    """Each matrix of a file alone is loaded or refused by name: never the bare base."""
    base = bases(family)
    with_lora(base, own := f"{family.name}_{layout}_whole")
    (tmp_path / "plain").mkdir()
    state = load_file(globals()[layout](base, own, tmp_path))
    halves = ("lora_A", "lora_B", "lora_down", "lora_up")
    modules = sorted({key.partition(".lora_")[0] for key in state if any(half in key for half in halves)})
    condition = condition_of(base, ["a red ring", ""], None, 64, 64)
    bare = velocity(base_field(base))
    for number, module in enumerate(modules[:: max(1, len(modules) // 4)]):
        part = {
            k: (v + 0.3 if "lora" in k[len(module) :] else v) for k, v in state.items() if k.startswith(f"{module}.")
        }
        save_file(part, tmp_path / "part.safetensors")
        name = f"{own}_{number}"
        field = load_field(base, name, tmp_path / "part.safetensors")
        assert any(f".{name}." in key for key, _ in base.transformer.named_parameters()), module
        assert (velocity(field) - bare).abs().max() > 0, module
    assert len(modules) > 1 and len(condition) == 2


def test_a_kohya_file_keeps_its_modulations(bases, tmp_path):
    base = bases(FLUX2)
    changed, state = base.new_transformer(), {}
    for seed, name in enumerate(("double_stream_modulation_img", "single_stream_modulation")):
        weight = changed.get_submodule(f"{name}.linear").weight
        draw = torch.Generator().manual_seed(seed)
        up, down = (torch.randn(shape, generator=draw) for shape in ((len(weight), 1), (1, weight.shape[1])))
        weight.data += up @ down
        state |= {f"lora_unet_{name}_lin.lora_up.weight": up, f"lora_unet_{name}_lin.lora_down.weight": down}
    save_file(state, tmp_path / "lora.safetensors")
    wanted = velocity(VelocityField("changed", base, changed))
    torch.testing.assert_close(
        velocity(load_field(base, "kept", tmp_path / "lora.safetensors")), wanted, atol=1e-4, rtol=1e-4
    )
    assert (wanted - velocity(base_field(base))).abs().max() > 1e-2


@pytest.mark.parametrize("broken", ["half", "nan"])
def test_a_peft_folder_is_held_to_the_same(bases, broken, tmp_path):
    base = bases(FLUX2)
    with_lora(base, f"whole_{broken}")
    save_lora(base.transformer, f"whole_{broken}", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    save_file(without(state, "lora_A") if broken == "half" else spoilt(state, float("nan")), file)
    with pytest.raises(UserError, match=r"has no A \(down\)" if broken == "half" else "not finite"):
        load_field(base, f"broken_{broken}", tmp_path)
    assert f"broken_{broken}" not in base.transformer.peft_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k.replace("attn", "attention"): v for k, v in s.items()},
            r"LoRA weights do not fit the base's "
            r"Flux2Transformer2DModel: transformer\.\w*transformer_blocks\.0\.attention",
        ),
        (wide, r"1 of \d+ LoRA weights do not fit .* takes 7 features, the base has"),
        (lambda s: without(s, "lora_B"), r"has no B \(up\); half a LoRA changes nothing"),
        (lambda s: without(s, "lora_A"), r"has no A \(down\); half a LoRA changes nothing"),
        (
            lambda s: {k.replace(".weight", ".default.weight"): v for k, v in s.items()},
            "names of a PEFT model in memory",
        ),
        (lambda s: spoilt(s, float("nan")), "holds numbers that are not finite"),
        (lambda s: spoilt(s, float("inf")), "holds numbers that are not finite"),
        (
            lambda s: s | {"transformer.norm_out.diff": torch.zeros(1)},
            "no part of a plain LoRA: transformer.norm_out.diff",
        ),
        (lambda s: s | {"transformer.proj_out.lora_mid.weight": torch.zeros(1)}, "a Tucker adapter"),
        (
            lambda s: {k.replace("transformer.", "model.transformer.", 1): v for k, v in s.items()},
            r"do not fit the base's .* what is read: a PEFT folder; .* OneTrainer \(lora_transformer_\)",
        ),
        (lambda s: s | {"transformer.x.lokr_w1": torch.zeros(1)}, "a LoKr adapter, which is no plain LoRA"),
        (lambda s: s | {"transformer.x.dora_scale": torch.zeros(1)}, "a DoRA adapter, which is no plain LoRA"),
        (
            lambda s: {k.replace("transformer.", "text_encoder."): v for k, v in s.items()},
            "no LoRA weights of a transformer; found: text_encoder",
        ),
        (
            lambda s: {k.replace("transformer.", "diffusion_model.what."): v for k, v in s.items()},
            "(no LoRA|nothing) that Flux2KleinPipeline knows",
        ),
    ],
)
def test_a_lora_file_that_does_not_fit_is_named(bases, change, message, tmp_path):
    base = bases(FLUX2)
    save_file(change(lora_state(base, tmp_path)), tmp_path / "lora.safetensors")
    before = set(base.transformer.peft_config)
    with pytest.raises(UserError, match=message):
        load_field(base, "wrong", tmp_path / "lora.safetensors")
    assert set(base.transformer.peft_config) == before


def test_a_pickled_file_is_not_read(bases, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "lora.pt")
    with pytest.raises(UserError, match=r"not a safetensors file .* pickled checkpoints are not read"):
        load_field(bases(FLUX2), "wrong", tmp_path / "lora.pt")


def test_what_shapes_a_peft_lora_is_heeded_and_what_makes_more_of_it_refused(bases, tmp_path):
    base = bases(FLUX2)
    field = with_lora(base, "plain", seed=3)
    save_lora(base.transformer, "plain", tmp_path / "a")
    config = read_json(tmp_path / "a" / CONFIG)
    write_json(tmp_path / "a" / CONFIG, config | {"alpha_pattern": {"to_q": 0}, "use_rslora": False})
    one = load_field(base, "without_q", tmp_path / "a")
    assert (velocity(one) - velocity(field)).abs().max() > 1e-3
    for change, message in (
        ({"use_dora": True}, "use_dora is set, which is no plain LoRA"),
        ({"bias": "all"}, "bias is set, which is no plain LoRA"),
        ({"peft_type": "LOHA"}, "not a LoRA's configuration"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"r": 5}, r"is \(2, \d+\), the transformer takes \(5, \d+\)"),
    ):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        write_json(tmp_path / "b" / CONFIG, config | change)
        with pytest.raises(UserError, match=message):
            load_field(load_backbone_of(base), "wrong", tmp_path / "b")


def load_backbone_of(base):
    return load_backbone(base._folder, base.settings)


# ------------------------------------------------------------------------------------------------------- whole weights


def qkv_in_one(state):
    """Z-Image's first release: query, key and value as one matrix, other names at both ends."""
    state = dict(state)
    for key in [k for k in state if k.endswith(".to_q.weight")]:
        parts = [state.pop(key.replace("to_q", f"to_{x}")) for x in "qkv"]
        state[key.replace("to_q", "qkv")] = torch.cat(parts)
    names = {
        "all_x_embedder.2-1.": "x_embedder.",
        "all_final_layer.2-1.": "final_layer.",
        ".to_out.0.": ".out.",
        ".norm_q.": ".q_norm.",
        ".norm_k.": ".k_norm.",
    }
    for new, old in names.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    return state


def prefixed(state):
    return {f"model.diffusion_model.{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    ("family", "change"),
    [(FLUX2, dict), (SD3, dict), (QWEN_IMAGE, prefixed), (Z_IMAGE, qkv_in_one)],
    ids=["flux2_klein-diffusers", "sd3-diffusers", "qwen_image-prefixed", "z_image-original"],
)
def test_a_single_file_is_a_checkpoint(bases, folder_of, family, change, tmp_path):
    base = bases(family)
    state = load_file(next((folder_of(family) / "transformer").glob("*.safetensors")))
    state = {key: value * 1.1 for key, value in state.items()}
    save_file({k: v.contiguous() for k, v in change(state).items()}, tmp_path / "model.safetensors")
    assert field_kind(tmp_path / "model.safetensors") == "full"
    field = load_field(base, "other", tmp_path / "model.safetensors")
    for key, value in field.network.state_dict().items():
        torch.testing.assert_close(value, state[key])
    assert (velocity(field) - velocity(base_field(base))).abs().max() > 1e-3
    low = base.new_transformer(tmp_path / "model.safetensors", torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def cut(state):
    return {k: v for k, v in state.items() if k != "proj_out.weight"} | {"extra": torch.zeros(1)}


def squeezed(state):
    return state | {"proj_out.weight": torch.zeros(2, 3)}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"does not fit .*config; keys 1 missing: proj_out\.weight; 1 unexpected: extra"),
        (squeezed, r"does not fit .*config; keys 1 of another shape: proj_out\.weight is \(2, 3\), not \(\d+, 32\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_which_keys(bases, folder_of, change, message, single, tmp_path):
    whole = tmp_path / "pipeline"
    shutil.copytree(folder_of(FLUX2), whole)
    file = next((whole / "transformer").glob("*.safetensors"))
    save_file(change(load_file(file)), file)
    with pytest.raises(UserError, match=message):
        bases(FLUX2).new_transformer(file if single else whole)
    if not single:
        with pytest.raises(UserError, match=message):
            load_backbone(whole, FLUX2.shape())


def test_what_is_no_checkpoint_of_the_family_is_named(bases, folder_of, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    for family in (FLUX2, Z_IMAGE, QWEN_IMAGE):
        with pytest.raises(UserError, match=r"no checkpoint of a|does not fit the base's config"):
            bases(family).new_transformer(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a ZImagePipeline folder, and this model\.backbone takes Flux2KleinPipeline"):
        load_backbone(folder_of(Z_IMAGE), FLUX2.shape())
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.json").write_text(json.dumps(dict(bases(FLUX2).transformer.config)))
    with pytest.raises(UserError, match="no safetensors file there"):
        bases(FLUX2).new_transformer(tmp_path / "t")


@pytest.mark.parametrize("single", [False, True])
def test_a_checkpoint_with_numbers_that_are_none_is_refused(bases, folder_of, single, tmp_path):
    base = bases(FLUX2)
    folder = shutil.copytree(folder_of(FLUX2) / "transformer", tmp_path / "transformer")
    file = next(folder.glob("*.safetensors"))
    state = load_file(file)
    state["proj_out.weight"][0, 0] = float("nan")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"proj_out\.weight holds numbers that are not finite"):
        load_field(base, "nan", file if single else folder)
    pipeline = shutil.copytree(folder_of(FLUX2), tmp_path / "pipeline")
    shutil.copy(file, pipeline / "transformer" / file.name)
    with pytest.raises(UserError, match=r"proj_out\.weight holds numbers that are not finite"):
        load_backbone(pipeline, FLUX2.shape())
