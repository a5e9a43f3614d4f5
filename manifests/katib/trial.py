"""One trial of a search: trains and evaluates a student, and says its figures in the lines that Katib reads.

    python trial.py --recipe world --workspace /workspace --set distill.window=uniform

`retention` is the mean of student / teacher over the metrics that are measured as a rate; `passed` is 1 if all gates
hold. Exit codes are those of `danceopd evaluate`, so that a Job's failure policy can tell them apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run the trial; returns the exit code."""
    command = [sys.executable, "-m", "danceopd", "evaluate", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        lines = [line for line in child.stdout if not print(line, end="", flush=True)]
        code = child.wait()
    if code == 0:
        for name, value in figures(metrics_of(lines[-1])).items():
            print(f"{name}={value:.6f}", flush=True)
    return code


def metrics_of(last_line: str) -> dict:
    """What `danceopd evaluate` measured; its last line names the report beside it."""
    report = Path(last_line.partition(": ")[0])
    return json.loads((report.parent / "metrics.json").read_text())


def figures(metrics: dict) -> dict[str, float]:
    """The search's objective, and whether all gates hold."""
    entries = [entry for task in metrics["retention"].values() for entry in task.values()]
    ratios = [entry["ratio"] for entry in entries if entry["ratio"] is not None]
    return {"retention": sum(ratios) / len(ratios), "passed": float(metrics["passed"])}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
