"""Every model family against the stock pipeline it is made for, through one set of tests."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from tiny_models import EDITORS, FAMILIES, FLUX2, QWEN_IMAGE, SD3, Z_IMAGE, stock_latents
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from danceopd.backbones import FAMILIES as KNOWN
from danceopd.backbones import load_backbone, open_outline
from danceopd.backbones.base import Condition
from danceopd.backbones.lora import add_lora, save_diffusers_lora
from danceopd.backbones.packing import pack_parts, to_latents, to_tokens, unpack_parts
from danceopd.config.recipe import LoraRecipe
from danceopd.data.cache import EncodingCache
from danceopd.data.columns import table_of
from danceopd.data.encode import encode_cached, encode_records
from danceopd.data.encoded import Sizing
from danceopd.data.records import Record
from danceopd.errors import UserError
from danceopd.files import read_json, write_json
from danceopd.flow.field_io import load_field, save_field
from danceopd.flow.fields import VelocityField
from danceopd.flow.guidance import GuidedField
from danceopd.flow.rollout import roll_out
from danceopd.flow.sampling import sample_pixels, seeded_noise
from danceopd.inference.generate import Drawer, open_student
from danceopd.preflight.fake_pass import Samples, forward_operations

PROMPTS = ["a red ring", "", "draw a small green square at the top left and one more below it"]
SIZES = [(64, 64), pytest.param(64, 96, marks=pytest.mark.slow)]

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
every_editor = pytest.mark.parametrize("family", EDITORS, ids=lambda family: family.name)
CASES = [(family, edits) for family in FAMILIES for edits in (False, True) if family.edits or not edits]
drawing_and_editing = pytest.mark.parametrize(
    ("family", "edits"), CASES, ids=[f"{f.name}-{'edit' if e else 'draw'}" for f, e in CASES]
)


def picture(seed, height, width):
    values = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)


def png(seed, height=64, width=64):
    buffer = io.BytesIO()
    picture(seed, height, width).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def condition_of(base, prompts, image, height, width):
    """`image`: what every prompt edits: a picture, several, or None."""
    images = [] if image is None else image if isinstance(image, list) else [image]
    shown = [pixels(one) for one in images]
    source = torch.cat([base.encode_images(one) for one in shown], dim=1).repeat(len(prompts), 1, 1) if shown else None
    prompt = base.encode_prompts(prompts, [[one[0] for one in shown]] * len(prompts))
    return Condition(prompt, source, height, width)


def base_field(base):
    return VelocityField("base", base, base.transformer)


def our_latents(field, condition, noise, steps):
    grid = field.backbone.sigmas(steps, condition.height, condition.width)
    return roll_out(field, noise, grid, torch.full((len(noise),), steps), condition).state


def noise_of(base, count, height=64, width=64):
    return seeded_noise(list(range(count)), base.latent_shape(height, width))


def randomize(network, adapter, seed=0):
    """Give a fresh adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if f".{adapter}." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def with_lora(base, name="teacher", seed=0):
    add_lora(base.transformer, name, LoraRecipe(rank=2, alpha=3), base.lora_targets, seed)
    randomize(base.transformer, name, seed)
    return VelocityField(name, base, base.transformer, adapter=name)


def test_every_family_is_on_test():
    assert {family.name for family in FAMILIES} == set(KNOWN)


@drawing_and_editing
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_velocities_equal_the_stock_pipelines(load, folder_of, family, edits, height, width, monkeypatch):
    # The stock Qwen pipeline shows the transformer sources of a megapixel, whatever it draws.
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", height * width)
    steps, base = 2, load(family, height, width)
    image = picture(1, height, width) if edits else None
    noise = noise_of(base, 1, height, width)
    ours = our_latents(base_field(base), condition_of(base, PROMPTS[:1], image, height, width), noise, steps)
    stock = family.open_stock(folder_of(family), edits)
    theirs = stock_latents(family, stock, PROMPTS[:1], noise, height, width, steps, image)
    assert (theirs - noise).std() > 0.1  # a velocity worth comparing
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@drawing_and_editing
def test_guided_pictures_equal_the_stock_pipelines(load, folder_of, family, edits, monkeypatch):
    """A scale means what the family's own pipeline means by it: `stock_guidance` says how that one is asked."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    base, scale, image = load(family), 20.0, picture(1, 64, 64) if edits else None
    noise, condition = noise_of(base, 1), condition_of(base, PROMPTS[:1], image, 64, 64)
    guided = GuidedField(base_field(base), scale, base.encode_prompts([""])[0])
    ours, plain = (our_latents(field, condition, noise, 2) for field in (guided, base_field(base)))
    stock = family.open_stock(folder_of(family), edits)
    asked = base.stock_guidance(scale)
    theirs = stock_latents(family, stock, PROMPTS[:1], noise, 64, 64, 2, image, asked)
    assert (ours - plain).abs().max() > 2e-2  # a difference worth comparing
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    without = stock_latents(family, stock, PROMPTS[:1], noise, 64, 64, 2, image, base.stock_guidance(1.0))
    torch.testing.assert_close(plain, without, atol=1e-4, rtol=1e-4)


@drawing_and_editing
def test_a_prompt_of_any_length_gives_in_a_batch_what_it_gives_alone(load, family, edits):
    base = load(family)
    image = picture(2, 64, 64) if edits else None
    together = condition_of(base, PROMPTS, image, 64, 64)
    noise, sigma = noise_of(base, 3), torch.tensor([0.9, 0.5, 0.1])
    velocity = base_field(base)(noise, sigma, together)
    for row, prompt in enumerate(PROMPTS):
        alone = condition_of(base, [prompt], image, 64, 64)
        torch.testing.assert_close(alone.prompt[0], together.prompt[row], atol=1e-4, rtol=1e-4)
        one = base_field(base)(noise[[row]], sigma[[row]], alone)
        torch.testing.assert_close(one[0], velocity[row], atol=1e-4, rtol=1e-3)
    others = base_field(base)(noise[[0, 0, 0]], sigma[[0, 0, 0]], together)
    assert (others[0] - others[1]).abs().max() > 1e-4 < (others[0] - others[2]).abs().max()


@every_family
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_become_latents_and_come_back(load, family, height, width):
    base = load(family, height, width)
    pictures = torch.cat([pixels(picture(seed, height, width)) for seed in (1, 2)])
    latents = base.encode_images(pictures)
    assert latents.shape == (2, *base.latent_shape(height, width))
    torch.testing.assert_close(base.encode_images(pictures[:1])[0], latents[0], atol=1e-4, rtol=1e-4)
    back = base.decode(latents, height, width)
    assert back.shape == pictures.shape
    assert back.abs().max() <= 1


@every_family
def test_the_grid_falls_from_noise_to_clean(load, family):
    grid = load(family).sigmas(6, 64, 64)
    assert len(grid) == 7
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    assert load(family).sigmas(1, 64, 64).tolist() == [1, 0]


@every_family
def test_a_size_that_does_not_fit_is_refused(load, family):
    with pytest.raises(UserError, match="64x70: both sides must be multiples of 16"):
        load(family).latent_shape(64, 70)


@every_family
def test_a_folder_without_the_familys_pipeline_is_refused(family, tmp_path):
    with pytest.raises(UserError, match=r"no \w+Pipeline( or \w+Pipeline)? folder"):
        load_backbone(tmp_path, family.shape())


@every_editor
def test_a_source_image_changes_the_velocity_but_not_its_shape(load, family):
    base = load(family)
    edits = [condition_of(base, PROMPTS[:1], picture(seed, 64, 64), 64, 64) for seed in (1, 2)]
    noise, sigma = noise_of(base, 1), torch.tensor([0.5])
    plain, one, other = (base_field(base)(noise, sigma, c) for c in (replace(edits[0], source=None), *edits))
    assert plain.shape == one.shape == noise.shape
    assert (plain - one).abs().max() > 1e-3 < (one - other).abs().max()


@pytest.mark.parametrize("family", [FLUX2, QWEN_IMAGE], ids=lambda family: family.name)
def test_several_source_images_enter_as_in_the_stock_pipeline(load, folder_of, family, monkeypatch):
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    base, images = load(family), [picture(1, 64, 64), picture(2, 64, 64)]
    noise, condition = noise_of(base, 1), condition_of(base, PROMPTS[:1], images, 64, 64)
    ours = our_latents(base_field(base), condition, noise, 2)
    theirs = stock_latents(family, family.open_stock(folder_of(family), True), PROMPTS[:1], noise, 64, 64, 2, images)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for one in (images[:1], images[1:], images[::-1]):
        other = our_latents(base_field(base), condition_of(base, PROMPTS[:1], one, 64, 64), noise, 2)
        assert (other - ours).abs().max() > 1e-3
    cut = replace(condition, source=condition.source[:, :-1])
    with pytest.raises(UserError, match="31 tokens of source images beside 16 of the picture"):
        base_field(base)(noise, torch.tensor([0.5]), cut)


def test_a_family_that_draws_only_says_so(load):
    base = load(SD3)
    condition = condition_of(base, PROMPTS[:1], picture(1, 64, 64), 64, 64)
    with pytest.raises(UserError, match="cannot edit a source image; give it drawing tasks only"):
        base_field(base)(noise_of(base, 1), torch.tensor([0.5]), condition)


def test_a_picture_with_more_places_than_the_base_has_is_refused(load):
    with pytest.raises(UserError, match="64x272: this base takes at most 256 pixels per side"):
        load(SD3).latent_shape(64, 272)


def test_z_image_takes_one_source_of_the_pictures_own_size(load):
    base = load(Z_IMAGE)
    condition = condition_of(base, PROMPTS[:1], picture(1, 64, 64), 64, 64)
    twice = replace(condition, source=torch.cat([condition.source] * 2, dim=1))
    with pytest.raises(UserError, match="one source image of the picture's own size"):
        base_field(base)(noise_of(base, 1), torch.tensor([0.5]), twice)


def test_qwens_prompts_see_their_own_source_and_are_kept_apart(load, tmp_path):
    base = load(QWEN_IMAGE)
    records = [
        Record(str(i), "edit" if i else "draw", "a red ring", png(i) if i else None, None, "train") for i in range(3)
    ]
    encoded = encode_records(base, records, 64, 64, None, "k", targets=False)
    assert encoded.prompt_row.tolist() == [0, 1, 2]
    for row, images in ((0, None), (1, picture(1, 64, 64)), (2, picture(2, 64, 64))):
        alone = condition_of(base, ["a red ring"], images, 64, 64)
        assert torch.equal(encoded.prompts[row], alone.prompt[0])
    assert (encoded.prompts[1] - encoded.prompts[2]).abs().max() > 1e-3
    cached = encode_cached(base, table_of(records), Sizing(64, 64), EncodingCache(tmp_path), "k", targets=False)
    assert torch.equal(cached.prompts[cached.prompt_row], encoded.prompts[encoded.prompt_row])
    drawer = Drawer(base_field(base), QWEN_IMAGE.shape())
    drawn = drawer.draw(["a red ring"], [picture(1, 64, 64)], [7], 2)[0]
    wanted = sample_pixels(base_field(base), encoded.condition([1]), [7], 2)[0].permute(1, 2, 0)
    np.testing.assert_allclose(np.asarray(drawn) / 127.5 - 1, wanted, atol=2e-2)


def test_a_qwen_base_that_cannot_edit_says_so(load, folder_of, tmp_path):
    with pytest.raises(UserError, match=r"max_sequence_length 300: 1 source image\(s\) and the empty prompt take \d+"):
        short = QWEN_IMAGE.shape().model_copy(update={"max_sequence_length": 300})
        condition_of(load_backbone(folder_of(QWEN_IMAGE), short), PROMPTS[:1], picture(1, 64, 64), 64, 64)
    QWEN_IMAGE.open_stock(folder_of(QWEN_IMAGE), False).save_pretrained(str(tmp_path))
    base = load_backbone(tmp_path, QWEN_IMAGE.shape())
    assert torch.equal(base.encode_prompts(PROMPTS), load(QWEN_IMAGE).encode_prompts(PROMPTS))
    with pytest.raises(UserError, match="this Qwen-Image base cannot edit a source image"):
        condition_of(base, PROMPTS[:1], picture(1, 64, 64), 64, 64)
    index = read_json(tmp_path / "model_index.json")
    write_json(tmp_path / "model_index.json", index | {"_class_name": "QwenImageLayeredPipeline"})
    with pytest.raises(
        UserError, match=r"a QwenImageLayeredPipeline folder, and this model\.backbone takes QwenImageEditPlusPip"
    ):
        load_backbone(tmp_path, QWEN_IMAGE.shape())


def test_a_qwen_student_keeps_the_bases_processor(load, folder_of, tmp_path):
    base = load(QWEN_IMAGE)
    base.free_encoders()
    base.save(tmp_path / "student", base.transformer)
    for name in ("model_index.json", "processor/processor_config.json"):
        assert read_json(tmp_path / "student" / name) == read_json(folder_of(QWEN_IMAGE) / name)
    condition = condition_of(load(QWEN_IMAGE), PROMPTS[:1], picture(1, 64, 64), 64, 64)
    again = load_backbone(tmp_path / "student", QWEN_IMAGE.shape())
    assert torch.equal(condition_of(again, PROMPTS[:1], picture(1, 64, 64), 64, 64).prompt, condition.prompt)


def test_an_omni_checkpoint_of_z_image_is_refused(folder_of, tmp_path):
    omni = tmp_path / "omni"
    shutil.copytree(folder_of(Z_IMAGE), omni)
    stock = Z_IMAGE.open_stock(omni, False)
    stock.transformer = type(stock.transformer).from_config(dict(stock.transformer.config) | {"siglip_feat_dim": 8})
    stock.save_pretrained(str(omni))
    with pytest.raises(UserError, match="an omni checkpoint with a SigLIP tower; give a Z-Image base without one"):
        load_backbone(omni, Z_IMAGE.shape())


@every_family
def test_a_lora_reaches_the_attention_and_loads_in_the_stock_pipeline(load, folder_of, family, tmp_path):
    base = load(family)
    field = with_lora(base)
    save_field(field, tmp_path / "field")
    file = save_diffusers_lora(base.transformer, field.adapter, tmp_path)
    condition, noise = condition_of(base, PROMPTS[:1], None, 64, 64), noise_of(base, 1)
    ours = our_latents(field, condition, noise, 2)
    assert (ours - our_latents(base_field(base), condition, noise, 2)).abs().max() > 1e-2
    stock = family.open_stock(folder_of(family), False)
    stock.load_lora_weights(str(tmp_path), weight_name=file.name)
    theirs = stock_latents(family, stock, PROMPTS[:1], noise, 64, 64, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    again = load_field(load(family), "again", tmp_path / "field")
    torch.testing.assert_close(our_latents(again, condition, noise, 2), ours, atol=1e-5, rtol=1e-5)


@every_family
def test_full_weights_open_in_the_stock_pipeline_and_draw_the_same_picture(load, family, tmp_path):
    base = load(family)
    network = base.new_transformer()
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.1)
    base.save(tmp_path / "student", network)
    assert base.transformer is not network
    condition = condition_of(base, PROMPTS[:1], None, 64, 64)
    field = VelocityField("student", base, network)
    stock = family.open_stock(tmp_path / "student", False)
    theirs = stock_latents(family, stock, PROMPTS[:1], noise_of(base, 1), 64, 64, 2)
    torch.testing.assert_close(our_latents(field, condition, noise_of(base, 1), 2), theirs, atol=1e-4, rtol=1e-4)
    drawn = open_student(tmp_path / "student").draw(PROMPTS[:1], [None], [7], 2)[0]
    wanted = sample_pixels(field, condition, [7], 2)[0].permute(1, 2, 0)
    np.testing.assert_allclose(np.asarray(drawn) / 127.5 - 1, wanted, atol=2e-2)
    other = base.new_transformer(tmp_path / "student")
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@every_family
def test_encoders_that_were_let_go_come_back(load, family):
    base = load(family)
    before = base.encode_prompts(PROMPTS[:1])
    base.free_encoders()
    assert base.pipeline.text_encoder is None
    assert torch.equal(base.encode_prompts(PROMPTS[:1]), before)


@drawing_and_editing
def test_guidance_puts_the_empty_prompt_in_the_prompts_place(load, family, edits):
    base = load(family)
    image = picture(3, 64, 64) if edits else None
    noise, sigma = noise_of(base, 2), torch.tensor([0.8, 0.3])
    full, empty = (condition_of(base, [p, p], image, 64, 64) for p in (PROMPTS[2], ""))
    field = base_field(base)
    guided = GuidedField(field, 3.0, base.encode_prompts([""])[0])
    expected = base.guide(field(noise, sigma, empty), field(noise, sigma, full), 3.0)
    torch.testing.assert_close(guided(noise, sigma, full), expected, atol=1e-3, rtol=1e-3)


def test_parts_of_prompts_are_told_apart_again():
    prompts = [[torch.randn(2, 4), torch.randn(1, 4)], [torch.zeros(1, 4), torch.randn(3, 4)]]
    packed = pack_parts(prompts, 6)
    assert packed.shape == (2, 6, 5)
    for parts, found in zip(prompts, unpack_parts(packed.bfloat16(), 1, 2), strict=True):
        for part, again in zip(parts, found, strict=True):
            assert torch.equal(part.bfloat16(), again)
    assert [[len(part) for part in parts] for parts in unpack_parts(packed, 2, 2)] == [[1], [3]]


def test_latents_and_tokens_are_each_others_inverse():
    latents = torch.randn(2, 3, 4, 6)
    assert to_tokens(latents).shape == (2, 6, 12)
    assert torch.equal(to_latents(to_tokens(latents), 2, 3), latents)


@pytest.mark.slow
@drawing_and_editing
def test_operations_told_from_the_configuration_are_those_counted(load, folder_of, family, edits):
    base = load(family)
    longest = "a red fox in the snow " * base.settings.max_sequence_length  # cut at the limit
    condition = condition_of(base, [longest], picture(1, 64, 64) if edits else None, 64, 64)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel is not counted
        base_field(base)(noise_of(base, 1), torch.tensor([0.5]), condition)
    outline = open_outline(folder_of(family), family.shape())
    told = forward_operations(outline, Samples(1, 64, 64, edits))
    # Z-Image's editing template has short parts around the prompt, each of which it fills up to 32 tokens.
    room = 0.25 if family is Z_IMAGE and edits else 0.02
    assert told == pytest.approx(counter.get_total_flops(), rel=room)
    assert outline.latent_shape(64, 64) == base.latent_shape(64, 64)
    assert torch.equal(outline.sigmas(4, 64, 64), base.sigmas(4, 64, 64))
