"""The Dockerfile: pinned base, no root, nothing of the build left, writable places under a read-only root."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """(KEYWORD, rest) of every instruction, continuation lines joined, comments dropped."""
    text = (ROOT / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = lines.replace("\\\n", " ")
    words = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, rest in words]


def final_stage() -> list[tuple[str, str]]:
    every = instructions()
    last = max(i for i, (word, _) in enumerate(every) if word == "FROM")
    return every[last:]


def environment() -> dict[str, str]:
    pairs = " ".join(rest for word, rest in final_stage() if word == "ENV").split()
    return dict(pair.split("=", 1) for pair in pairs)


def test_the_base_is_pinned_by_tag():
    bases = [
        rest.partition("=")[2] for word, rest in instructions() if word == "ARG" and rest.startswith("BASE_IMAGE=")
    ]
    assert len(bases) == 1
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", bases[0]) and not bases[0].endswith(":latest")
    froms = [rest for word, rest in instructions() if word == "FROM"]
    assert len(froms) == 2 and all(rest.startswith("${BASE_IMAGE}") for rest in froms)


def test_the_user_is_a_number_and_not_root():
    users = [rest for word, rest in final_stage() if word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1]), "Kubernetes' runAsNonRoot needs a number"
    after = final_stage()[final_stage().index(("USER", users[-1])) :]
    assert "RUN" not in dict(after)


def test_the_final_stage_installs_nothing():
    for word, rest in final_stage():
        assert not (word == "RUN" and re.search(r"\b(pip|apt|apt-get|gcc|curl|wget)\b", rest)), rest
        assert word != "ADD"


def test_every_install_is_from_the_constraints_or_without_dependencies():
    commands = [part for word, rest in instructions() if word == "RUN" for part in rest.split("&&")]
    installs = [command for command in commands if "pip install" in command]
    assert installs
    for part in installs:
        assert "-c constraints.txt" in part or "--no-deps" in part
        assert " -e " not in part and "--editable" not in part


def test_everything_written_goes_below_tmp_or_the_workspace():
    found = environment()
    for name in ("HOME", "TMPDIR", "HF_HOME", "MPLCONFIGDIR", "DVC_SITE_CACHE_DIR"):
        assert found[name].split("/")[1] in ("tmp", "workspace"), name


def test_the_command_is_the_entry_point():
    assert ("ENTRYPOINT", '["danceopd"]') in final_stage()


def test_what_is_copied_exists_and_passes_the_ignore_file():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = [rest.split() for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    sources = [name for words in copies for name in words[:-1]]
    assert sources
    for name in sources:
        assert (ROOT / name).exists(), name
        assert name in allowed, f"{name} is kept out by .dockerignore"
    assert set(allowed) == set(sources), "what no COPY takes need not be sent"
