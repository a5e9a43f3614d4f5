"""What a student cost: seconds on which hardware, forwards through a transformer, device hours in all."""

from __future__ import annotations

from dataclasses import dataclass

from danceopd.files import read_json
from danceopd.workspace import STEP, Product

TRAINED = 3  # forwards that a sample's forward and backward pass through a transformer cost together


@dataclass(frozen=True)
class Spent:
    """What one step took, on the machine it ran on.

    Attributes:
        what: the step, for the reader.
        seconds: from start to end; of training that was resumed, since the last start.
        hardware: `device` and `count`, as `devices.hardware` tells them; None where it is not known.
        forwards: samples that went through a transformer, a trained one counted `TRAINED` times; None if not counted.
    """

    what: str
    seconds: float
    hardware: dict | None
    forwards: float | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether no accelerator took part."""
        return self.hardware is not None and self.hardware["device"] == "cpu"

    @property
    def device_hours(self) -> float:
        """Hours of all its devices, or of all its CPU cores, together."""
        return 0.0 if self.hardware is None else self.seconds * self.hardware["count"] / 3600

    def told(self) -> str:
        """In one phrase."""
        words = [f"{self.seconds:,.0f} s"]
        if self.hardware is not None:
            count, device = self.hardware["count"], self.hardware["device"]
            words.append(f"on {count} CPU core{'s' if count > 1 else ''}" if self.on_cpu else f"on {count} x {device}")
        counted = "" if self.forwards is None else f", {self.forwards:,.0f} forwards"
        return " ".join(words) + counted


def cost_table(steps: list[Spent]) -> dict[str, str]:
    """Each step in one phrase, then the hours of accelerators and CPU cores and the forwards over all of them."""
    rows = {step.what: step.told() for step in steps}
    for title, on_cpu in (("GPU hours", False), ("CPU core hours", True)):
        hours = sum(step.device_hours for step in steps if step.on_cpu is on_cpu)
        if hours:
            rows[title] = f"{hours:.3g}"
    return rows | {"forwards": f"{sum(step.forwards or 0 for step in steps):,.0f}"}


def spent_on(teachers: dict[str, Product], student: Product) -> list[Spent]:
    """What the products that took time took, each on the machine it was made on."""
    made = {f"teacher {name}": product for name, product in sorted(teachers.items())} | {"distillation": student}
    rows = []
    for name, product in made.items():
        seconds = read_json(product.folder / STEP)["seconds"]
        if seconds > 0:
            rows.append(Spent(name, seconds, product.facts.get("hardware"), product.facts.get("forwards")))
        if tuned := product.facts.get("tuned"):
            rows.append(Spent(f"{name}, fine-tuned in an earlier run", **tuned))
    return rows
