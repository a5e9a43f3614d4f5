"""What every benchmark shares: measuring in turns, medians and ratios, and a report as Markdown and JSON."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from danceopd.errors import UserError
from danceopd.files import write_atomic

PACKAGES = ("torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Bar:
    """A figure that must hold.

    Attributes:
        what: the figure's name.
        value: as measured.
        limit: what it must reach (`at_least`) or not exceed.
        at_least: which of the two.
    """

    what: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def held(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        return f"{self.what}: {self.value:.3g} ({sign} {self.limit:g}): {'held' if self.held else 'MISSED'}"


@dataclass(frozen=True)
class Report:
    """What one benchmark found.

    Attributes:
        name: the script's.
        title: of its section.
        how: one paragraph: what was measured, and how.
        columns: of the table.
        rows: of the table, numbers or text.
        bars: figures that must hold.
        notes: one line each, below the table.
        exact: whether all counts that must be exact are.
        details: plain data for the JSON only.
    """

    name: str
    title: str
    how: str
    columns: list[str]
    rows: list[list]
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    exact: bool = True
    details: dict = field(default_factory=dict)

    @property
    def held(self) -> bool:
        return self.exact and all(bar.held for bar in self.bars)

    def markdown(self) -> str:
        """The report as one section, without the machine."""
        lines = [f"### {self.title} (`{self.name}.py`)", "", self.how, ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(map(shown, row)) + " |" for row in self.rows]
        lines += [""] if self.bars or self.notes else []
        lines += [f"- {line}" for line in [*map(str, self.bars), *self.notes]]
        return "\n".join(lines) + "\n"

    def data(self) -> dict:
        """The report as plain data, with the machine."""
        bars = [asdict(bar) | {"held": bar.held} for bar in self.bars]
        return asdict(self) | {"bars": bars, "machine": machine()}


def shown(value: object) -> str:
    """A table cell: three significant digits, or the text."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> dict:
    """What the figures depend on, without naming the machine."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    facts = {
        "date": date.today().isoformat(),
        "processor": f"{os.cpu_count()}-core {platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "load": None if not hasattr(os, "getloadavg") else round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts | versions


def machine_line() -> str:
    """`machine` in one line."""
    facts = machine()
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", *PACKAGES))
    device = f"{facts['accelerator']}, " if "accelerator" in facts else ""
    return (
        f"Measured {facts['date']}: {device}{facts['processor']}, {facts['threads']} thread(s), "
        f"load {facts['load']} at the end; {versions}."
    )


def in_turns(contenders: dict[str, Callable[[int], object]], rounds: dict[str, int]) -> dict[str, list[float]]:
    """Time contenders in turns, so that a busy machine slows all of them alike.

    Args:
        contenders: by name; each is called with the round's number.
        rounds: how many rounds each takes part in, > 0; a round no one has had before warms up and is not counted.

    Returns:
        Seconds of each round by contender.
    """
    for run in contenders.values():
        run(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1, max(rounds.values()) + 1):
        for name, run in contenders.items():
            if number <= rounds[name]:
                started = time.perf_counter()
                run(number)
                seconds[name].append(time.perf_counter() - started)
    return seconds


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times `fast` beats `slow`: the median over the rounds both took part in."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=False))


def held_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers that the modules hold; what several share counts once."""
    storages = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def arguments(description: str, **defaults: object) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    parser = argparse.ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_argument("--threads", type=int, help="torch's threads, the same for every side; default: its own choice")
    parser.set_defaults(**defaults)
    return parser


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument type: a comma-separated list of known names."""

    def read(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not known; choose from: {', '.join(known)}")
        return chosen

    return read


def run_script(parser: argparse.ArgumentParser, measure: Callable, argv: list[str] | None) -> int:
    """Read the command line, measure, print; returns the exit code: 0, 1 if a bar is missed, 2 for bad input."""
    quiet()
    try:
        options = parser.parse_args(argv)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        reports = measure(options)
    except (UserError, argparse.ArgumentError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    print("\n".join(report.markdown() for report in reports))
    print(machine_line())
    if options.json is not None:
        write_atomic(options.json, json.dumps([report.data() for report in reports], indent=2) + "\n")
    return 0 if all(report.held for report in reports) else 1


def quiet() -> None:
    """No progress bars and no libraries' warnings between the lines of a report."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
