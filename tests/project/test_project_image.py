"""The Dockerfile: pinned base, no root, nothing of the build left, writable places under a read-only root."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """(KEYWORD, rest) of every instruction, continuation lines joined, comments dropped."""
    text = (ROOT / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = lines.replace("\\\n", " ")
    words = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, rest in words]


IMAGES = ("full", "client", "compile")
anyone = pytest.mark.parametrize("image", IMAGES)


def stages() -> dict[str, list[tuple[str, str]]]:
    """Every stage's instructions by its name, its FROM first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            name = rest.partition(" AS ")[2]
            found[name] = []
        if found:
            found[name].append((word, rest))
    return found


def chain(image: str) -> list[tuple[str, str]]:
    """An image's instructions with those of the stages that it stands on, the base's first."""
    own = stages()[image]
    below = own[0][1].partition(" AS ")[0]
    return (chain(below) if below in stages() else []) + own


def environment(image: str) -> dict[str, str]:
    pairs = " ".join(rest for word, rest in chain(image) if word == "ENV").split()
    return dict(pair.split("=", 1) for pair in pairs)


def test_the_base_is_pinned_by_tag():
    bases = [
        rest.partition("=")[2] for word, rest in instructions() if word == "ARG" and rest.startswith("BASE_IMAGE=")
    ]
    assert len(bases) == 1
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", bases[0]) and not bases[0].endswith(":latest")
    assert all(chain(name)[0][1].startswith("${BASE_IMAGE} AS ") for name in stages())


def test_what_is_built_by_default_is_the_whole():
    assert list(stages())[-1] == "full"


@anyone
def test_the_user_is_a_number_and_not_root(image):
    users = [rest for word, rest in chain(image) if word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1]), "Kubernetes' runAsNonRoot needs a number"
    after = chain(image)[chain(image).index(("USER", users[-1])) :]
    assert "RUN" not in dict(after)


@anyone
def test_an_image_installs_nothing_but_the_compiler_where_that_is_wanted(image):
    for word, rest in chain(image):
        installs = word == "RUN" and re.search(r"\b(pip|apt|apt-get|gcc|curl|wget)\b", rest)
        assert not installs or (image == "compile" and "install --yes --no-install-recommends gcc g++" in rest), rest
        assert word != "ADD"


def test_the_compiler_finds_torchs_headers():
    copies = [rest for word, rest in stages()["compile"] if word == "COPY"]
    assert any(rest.endswith("/torch/include") for rest in copies)


def test_the_client_is_made_of_its_own_group_and_what_trains_of_all():
    sources = {name: " ".join(rest for _, rest in stages()[name]) for name in ("build", "client-build")}
    assert "['dependency-groups']['client']" in sources["client-build"] and "['dependencies']" in sources["build"]
    assert "TORCH_INDEX" not in sources["client-build"]


@pytest.mark.parametrize("stage", ["build", "client-build"])
def test_every_image_carries_its_bill_of_materials(stage):
    assert "cyclonedx-py environment /opt/danceopd --output-file /opt/danceopd/sbom.cdx.json" in str(stages()[stage])


def test_every_install_is_from_the_constraints_or_without_dependencies():
    commands = [part for word, rest in instructions() if word == "RUN" for part in rest.split("&&")]
    installs = [command for command in commands if "pip install" in command]
    assert installs
    for part in installs:
        tool = re.search(r"/opt/sbom/bin/pip install cyclonedx-bom==[\d.]+", part)  # stays outside of the image
        assert "-c constraints.txt" in part or "--no-deps" in part or tool
        assert " -e " not in part and "--editable" not in part


@anyone
def test_everything_written_goes_below_tmp_or_the_workspace(image):
    found = environment(image)
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in ("HOME", "TMPDIR", "HF_HOME", "MPLCONFIGDIR", "DVC_SITE_CACHE_DIR", *caches):
        assert found[name].split("/")[1] in ("tmp", "workspace"), name


@anyone
def test_the_command_is_the_entry_point(image):
    assert ("ENTRYPOINT", '["danceopd"]') in chain(image)


def test_what_is_copied_exists_and_passes_the_ignore_file():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = [rest.split() for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    sources = [name for words in copies for name in words[:-1]]
    assert sources
    for name in sources:
        assert (ROOT / name).exists(), name
        assert name in allowed, f"{name} is kept out by .dockerignore"
    assert set(allowed) == set(sources), "what no COPY takes need not be sent"
