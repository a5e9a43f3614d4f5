"""An export copies no network: weights are merged, written, read back and computed with one layer at a time."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from danceopd.backbones import load_backbone
from danceopd.backbones.base import repeated_blocks
from danceopd.backbones.lora import adapter_parameters, add_lora, plain_copy
from danceopd.backbones.streamed import OwnWeights, StoredWeights, in_float32
from danceopd.config.load import load_recipe
from danceopd.config.recipe import LoraRecipe
from danceopd.errors import UserError
from danceopd.export.student import PIPELINE, check_export, export_student, probe_condition, prove_export
from danceopd.flow.field_io import probe
from danceopd.flow.fields import VelocityField
from danceopd.pretraining import world_base as wb

SHAPE = wb.SHAPE.model_copy(update={"dtype": "bfloat16"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of many blocks, in bfloat16."""
    torch.manual_seed(0)
    deep = wb.new_transformer(192, 16, heads=2, head_dim=16, doubles=2, singles=10)
    place = tmp_path_factory.mktemp("deep")
    wb.new_pipeline(wb.new_vae().eval(), deep.bfloat16()).save_pretrained(str(place))
    return place


@pytest.fixture
def student(folder):
    """A LoRA student that is not the base, its text encoder freed."""
    backbone = load_backbone(folder, SHAPE)
    add_lora(backbone.transformer, "student", LoraRecipe(rank=4, alpha=4), backbone.lora_targets, 0)
    for parameter in adapter_parameters(backbone.transformer, "student"):
        torch.nn.init.normal_(parameter, std=0.05)
    return VelocityField("student", backbone, backbone.transformer.requires_grad_(False), "student")


def own_sizes(module):
    """Numbers of each of a module's weights, adapters' left out."""
    return [p.numel() for name, p in module.named_parameters() if ".lora_" not in name]


def exported(student, tmp_path, **model):
    """Export it with its encoder freed; the recipe has the student's dtype."""
    recipe = load_recipe("world", [])
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16", **model})})
    condition = probe_condition(student.backbone, recipe)
    student.backbone.free_encoders()
    export_student(student, recipe, None, tmp_path, condition)
    return tmp_path


def test_own_weights_are_those_of_a_merged_copy(student):
    merged = plain_copy(student.network, merge="student").state_dict()
    own = OwnWeights(student.network, "student", torch.float32)
    assert list(own) == list(merged) and len(own) == len(merged)
    for name, weight in own.items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=0)
    assert all(weight.dtype == torch.bfloat16 for weight in OwnWeights(student.network, None, torch.bfloat16).values())


def test_in_float32_is_the_float32_network_one_layer_at_a_time(student):
    network = student.network
    condition = probe_condition(student.backbone, load_recipe("world", []))
    merged = plain_copy(network, merge="student")
    wanted = probe(VelocityField("merged", student.backbone, merged), condition)
    before = {name: weight for name, weight in network.named_parameters()}
    most = 0

    def count(module, *told):
        nonlocal most
        raised = [p for p in network.parameters() if not any(p is own for own in before.values())]
        most = max(most, sum(p.nbytes for p in raised))

    with in_float32(network, OwnWeights(network, "student", torch.float32), "cpu"):
        hooks = [
            module.register_forward_pre_hook(count)  # behind the one that raises
            for module in network.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        found = probe(VelocityField("student", student.backbone, network), condition)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    blocks = [sum(own_sizes(block)) for block in repeated_blocks(network)]
    rest = sum(own_sizes(network)) - sum(blocks)
    assert 0 < most <= 4 * (rest + max(own_sizes(network)) + 64)  # and a bias
    assert all(weight is before[name] for name, weight in network.named_parameters())


def test_a_failed_pass_leaves_the_network_its_own_weights(student):
    network, before = student.network, dict(student.network.named_parameters())
    with pytest.raises(ZeroDivisionError), in_float32(network, {}, "cpu"):
        raise ZeroDivisionError
    assert all(weight is before[name] for name, weight in network.named_parameters())


def test_an_export_is_of_the_bases_dtype_and_copies_nothing(student, folder, tmp_path, monkeypatch):
    def never(*given, **named):
        raise AssertionError("a whole network was copied or read")

    monkeypatch.setattr("danceopd.backbones.weights.read_transformer", never)
    monkeypatch.setattr(type(student.network), "__deepcopy__", never, raising=False)
    exported(student, tmp_path)
    assert student.backbone._freed, "the text encoder was read again"
    weights = {
        n: w for f in (tmp_path / PIPELINE / "transformer").glob("*.safetensors") for n, w in load_file(f).items()
    }
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert sum(w.numel() for w in weights.values()) == sum(own_sizes(student.network))
    for file in (folder / "text_encoder").iterdir():
        assert (tmp_path / PIPELINE / "text_encoder" / file.name).read_bytes() == file.read_bytes()


def test_an_export_opens_with_its_encoder_and_is_the_merged_student(student, tmp_path):
    exported(student, tmp_path)
    assert check_export(tmp_path) and prove_export(tmp_path) < 1e-5
    again = load_backbone(tmp_path / PIPELINE, SHAPE)
    merged = plain_copy(student.network, merge="student").bfloat16().state_dict()
    for name, weight in again.transformer.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=0)
    assert again.encode_prompts(["red"]).isfinite().all()


def test_a_full_student_is_written_in_the_bases_dtype_too(folder, tmp_path):
    backbone = load_backbone(folder, SHAPE)
    network = backbone.new_transformer().float()
    with torch.no_grad():
        next(network.parameters()).add_(0.1)
    exported(VelocityField("student", backbone, network.requires_grad_(False)), tmp_path)
    assert not (tmp_path / "transformer").exists()
    assert {p.dtype for p in load_backbone(tmp_path / PIPELINE, SHAPE).transformer.parameters()} == {torch.bfloat16}


def test_stored_weights_that_lack_one_are_refused(student, tmp_path):
    exported(student, tmp_path)
    first = sorted((tmp_path / PIPELINE / "transformer").glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(UserError, match="missing"):
        StoredWeights(plain_copy(student.network), tmp_path / PIPELINE / "transformer")
