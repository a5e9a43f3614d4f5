"""Every family's tiny pipeline folder, made once."""

from __future__ import annotations

import copy

import pytest

from danceopd.backbones import load_backbone


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """family -> its tiny pipeline folder."""
    made = {}

    def folder(family):
        if family.name not in made:
            made[family.name] = tmp_path_factory.mktemp(family.name) / "tiny"
            family.make(made[family.name])
        return made[family.name]

    return folder


@pytest.fixture(scope="session")
def loaded_bases() -> dict:
    """What `load` copies, by family and size."""
    return {}


@pytest.fixture
def load(folder_of, loaded_bases):
    """family, height, width -> a tiny base of the test's own; a copy, since loading takes three times as long."""

    def base(family, height=64, width=64):
        key = family.name, height, width
        if key not in loaded_bases:
            loaded_bases[key] = load_backbone(folder_of(family), family.shape(height, width))
        return copy.deepcopy(loaded_bases[key])

    return base
