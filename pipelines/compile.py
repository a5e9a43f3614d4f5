"""The pipeline as YAML for a Kubeflow cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from kfp.compiler import Compiler

from danceopd.errors import UserError
from danceopd.files import write_atomic
from pipelines.distillation import build_pipeline
from pipelines.options import PipelineOptions


def compile_pipeline(
    out: Path, options: PipelineOptions, build: Callable[[PipelineOptions], Callable] = build_pipeline
) -> Path:
    """Write a compiled pipeline, by default the whole chain's: the same options, the same bytes.

    Raises:
        UserError: if `out` is not named as a YAML file.
    """
    out = Path(out)
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: a compiled pipeline is a .yaml file; name it so")
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "pipeline.yaml"
        Compiler().compile(build(options), str(package))
        return write_atomic(out, package.read_bytes())
