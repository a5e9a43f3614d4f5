"""The benchmark of real sizes runs every phase, at a tiny size and in one process, and writes weights in the layout."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import real_size, real_size_worker
from danceopd import finetune
from danceopd.backbones import load_backbone
from danceopd.config.recipe import ModelRecipe
from danceopd.errors import UserError


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs a command without a process of its own, whose imports would take most of the time."""

    def run(command, folder):
        monkeypatch.chdir(folder)
        return real_size_worker.measure(command)

    return run


@pytest.mark.slow
def test_every_phase_ends_and_is_measured(tmp_path, in_this_process):
    plain = finetune.finetune
    options = real_size.parser().parse_args(["--tiny"])
    report = real_size.measure_in(tmp_path, options, in_this_process)
    assert [row[0] for row in report.rows][-2:] == ["registration", "generate"]
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert all(row[1] >= row[2] > 0 and row[-1] > 0 for row in report.rows)
    assert (tmp_path / "tiny" / "out.png").is_file()
    assert finetune.finetune is plain


@pytest.mark.parametrize("base", real_size.BASES)
def test_weights_lie_in_several_files_that_the_back_end_reads(tmp_path, base):
    make, _, tiny = real_size.BASES[base]
    made = make(tiny, "small")
    real_size.make_base(made, tmp_path / "base")
    with real_size.init_empty_weights():
        wanted = {name: of.shape for name, of in made.transformer().named_parameters()}
    files = sorted((tmp_path / "base" / "transformer").glob("*.safetensors"))
    found = {name: of for file in files for name, of in load_file(file).items()}
    assert {name: of.shape for name, of in found.items()} == wanted
    assert all(of.dtype == torch.bfloat16 for of in found.values())
    model = ModelRecipe(base=str(tmp_path / "base"), height=64, width=64, max_sequence_length=24, **made.model)
    assert load_backbone(tmp_path / "base", model).encode_prompts(["a red square"]).isfinite().all()


def test_no_file_holds_more_than_it_should():
    weights = {str(number): torch.empty(8) for number in range(10)}
    files = list(real_size.in_files(weights, most=48))
    assert [len(file) for file in files] == [3, 3, 3, 1]
    assert {name for file in files for name in file} == set(weights)


def test_a_command_that_fails_says_how_it_ended(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such base >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(UserError, match="danceopd recipe check ended with 3: no such base"):
        real_size.run_command(["recipe", "check", "nowhere"], tmp_path)


def test_a_stretch_has_its_own_peak():
    meter = real_size_worker.Meter()
    meter.begin("large")
    block = torch.ones(2**24)
    meter.begin("small")
    del block
    meter.begin("after")
    meter.end()
    large, small, after = meter.found
    assert large.peak > after.peak + 2**25
    assert large.anonymous > after.anonymous + 2**25
    assert min(stretch.seconds for stretch in (large, small, after)) >= 0
