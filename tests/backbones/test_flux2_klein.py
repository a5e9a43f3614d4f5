"""The FLUX.2-klein back end against the stock pipeline: same velocities, same pictures, same latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from danceopd.backbones import load_backbone
from danceopd.backbones.base import Condition
from danceopd.backbones.flux2_klein import Flux2Klein
from danceopd.data import world
from danceopd.errors import UserError
from danceopd.flow.fields import VelocityField
from danceopd.flow.sampling import sample_pixels, seeded_noise, to_uint8
from danceopd.pretraining.world_base import OUT_LAYERS, PROMPT_TOKENS, SHAPE, to_tensor

SCENE = world.Scene("sand", (world.Thing("top left", "red", "ring"),))


def stock_picture(pipeline, prompt, image, latents, steps):
    """What the stock pipeline draws from given noise."""
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt=prompt,
        image=image,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=1.0,
        latents=latents,
        max_sequence_length=PROMPT_TOKENS,
        text_encoder_out_layers=OUT_LAYERS,
        output_type="np",
    )
    return result.images[0]


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_pictures_equal_the_stock_pipelines(backbone, tiny_base, edits, steps):
    picture = world.render(SCENE)
    source = backbone.encode_images(to_tensor([picture])) if edits else None
    condition = Condition(backbone.encode_prompts(["make it sepia"]), source, 64, 64)
    ours = sample_pixels(VelocityField("base", backbone, backbone.transformer), condition, [7], steps)
    noise = seeded_noise([7], backbone.latent_shape(64, 64))
    latents = noise.permute(0, 2, 1).unflatten(2, (4, 4))
    image = Image.fromarray(picture) if edits else None
    theirs = stock_picture(Flux2KleinPipeline.from_pretrained(str(tiny_base)), "make it sepia", image, latents, steps)
    np.testing.assert_allclose(((ours[0] + 1) / 2).permute(1, 2, 0).numpy(), theirs, atol=2e-4)


def test_a_source_image_changes_the_velocity_but_not_its_shape(backbone):
    prompt = backbone.encode_prompts(["a", "b"])
    shape = backbone.latent_shape(64, 64)
    state, sigma = torch.randn(2, *shape), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        plain = backbone.velocity(backbone.transformer, state, sigma, Condition(prompt, None, 64, 64))
        edited = backbone.velocity(
            backbone.transformer, state, sigma, Condition(prompt, torch.randn(2, *shape), 64, 64)
        )
    assert plain.shape == edited.shape == state.shape
    assert not torch.allclose(plain, edited, atol=1e-3)


def test_other_aspect_ratios_pass_through(backbone):
    picture = torch.rand(2, 3, 64, 96) * 2 - 1
    latents = backbone.encode_images(picture)
    assert latents.shape == (2, *backbone.latent_shape(64, 96))
    assert backbone.decode(latents, 64, 96).shape == picture.shape
    condition = Condition(backbone.encode_prompts(["a", "b"]), latents, 64, 96)
    with torch.no_grad():
        velocity = backbone.velocity(backbone.transformer, torch.randn_like(latents), torch.rand(2), condition)
    assert velocity.shape == latents.shape


def test_latents_are_scaled_as_the_pipeline_scales_them(backbone):
    pixels = to_tensor([world.render(SCENE)])
    expected = backbone.pipeline._pack_latents(backbone.pipeline._encode_vae_image(pixels, generator=None))
    torch.testing.assert_close(backbone.encode_images(pixels), expected)


def test_the_grid_falls_from_noise_to_clean(backbone):
    grid = backbone.sigmas(6, 64, 64)
    assert len(grid) == 7
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_a_size_that_does_not_fit_is_refused(backbone):
    with pytest.raises(UserError, match="64x70: both sides must be multiples of 16"):
        backbone.latent_shape(64, 70)


def test_a_saved_pipeline_reloads_with_the_same_velocity(backbone, tmp_path):
    network = backbone.new_transformer()
    with torch.no_grad():
        network.proj_out.weight.mul_(2)
    backbone.save(tmp_path / "student", network)
    other = load_backbone(tmp_path / "student", SHAPE)
    condition = Condition(backbone.encode_prompts(["a"]), None, 64, 64)
    state, sigma = torch.randn(1, *backbone.latent_shape(64, 64)), torch.tensor([0.5])
    with torch.no_grad():
        torch.testing.assert_close(
            other.velocity(other.transformer, state, sigma, condition),
            backbone.velocity(network, state, sigma, condition),
        )
    assert backbone.transformer is not network
    assert not any("_name_or_path" in path.read_text() for path in (tmp_path / "student").rglob("*.json"))


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match="no Flux2KleinPipeline folder"):
        load_backbone(tmp_path, SHAPE)


def test_a_checkpoint_of_another_latent_space_or_with_missing_weights_is_refused(backbone, tmp_path):
    from safetensors.torch import load_file, save_file

    from danceopd.pretraining.world_base import new_transformer

    new_transformer(192, 32, heads=2, head_dim=16, doubles=1, singles=1).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="not the same latent space"):
        backbone.new_transformer(tmp_path / "wide")
    backbone.new_transformer().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state.pop("proj_out.weight")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit its config; keys 1 missing: proj_out\.weight"):
        backbone.new_transformer(tmp_path / "cut")
    with pytest.raises(UserError, match="no transformer checkpoint"):
        backbone.new_transformer(tmp_path / "nothing")


def test_pixels_round_to_bytes():
    pixels = torch.tensor([-1.5, -1.0, 0.0, 1.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 255]


def test_the_text_encoder_stays_as_it_was_saved_and_comes_back(tiny_base, tmp_path):
    """Whatever the transformer's dtype, and whether it was freed before an export or not."""
    low = load_backbone(tiny_base, SHAPE.model_copy(update={"dtype": "bfloat16"}))
    low.pipeline.text_encoder.bfloat16()
    low.pipeline.save_pretrained(str(tmp_path / "low"))
    for dtype in ("float32", "bfloat16"):
        opened = load_backbone(tmp_path / "low", SHAPE.model_copy(update={"dtype": dtype}))
        assert opened.pipeline.text_encoder.dtype == torch.bfloat16
        assert {p.dtype for p in opened.transformer.parameters()} == {getattr(torch, dtype)}
        assert opened.pipeline.vae.dtype == torch.float32
        before = opened.encode_prompts(["a ring"])
        opened.free_encoders()
        assert opened.pipeline.text_encoder is None
        opened.save(tmp_path / dtype, opened.transformer)
        assert opened.pipeline.text_encoder is None  # its files were copied as they lie
        torch.testing.assert_close(opened.encode_prompts(["a ring"]), before)
        assert opened.pipeline.text_encoder.dtype == torch.bfloat16
        assert before.dtype == torch.float32
        again = load_backbone(tmp_path / dtype, SHAPE)
        torch.testing.assert_close(again.encode_prompts(["a ring"]), before)


def test_an_encoder_that_could_not_come_back_is_not_freed(tiny_base):
    pipeline = load_backbone(tiny_base, SHAPE).pipeline
    with pytest.raises(ValueError, match="could not come back"):
        Flux2Klein(pipeline, SHAPE).free_encoders()
