"""`danceopd data import-benchmark`: a public benchmark's prompts and pictures as an evaluation set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def data_import_benchmark(
    benchmark: Annotated[str, typer.Argument(help="geneval, gedit or imgedit")],
    source: Annotated[Path, typer.Argument(help="the benchmark's file or folder, as its authors give it out")],
    out: Annotated[Path, typer.Option(help="dataset folder that appears, for evaluate.benchmarks")] = ...,
    task: Annotated[str, typer.Option(help="task of the records, as a recipe calls it")] = ...,
    images: Annotated[Path | None, typer.Option(help="imgedit: folder of the pictures; default: the file's")] = None,
    language: Annotated[str, typer.Option(help="gedit: of the instructions")] = "en",
) -> None:
    """Write a benchmark as a dataset folder, to be named under evaluate.benchmarks."""
    from danceopd.evaluation.benchmark_sets import Asked, import_benchmark

    manifest = import_benchmark(benchmark, Asked(source, task, images, language), out)
    typer.echo(f"{out}: {manifest['counts'][task]['test']} records  content {manifest['content'][:16]}")
