"""Every family's tiny pipeline folder, made once."""

from __future__ import annotations

import pytest


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
