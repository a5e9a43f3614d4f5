"""The pipeline as YAML for a Kubeflow cluster: for its own API and UI, or as objects for kubectl."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from kfp.compiler import Compiler, KubernetesManifestOptions
from kfp.dsl.base_component import BaseComponent

from danceopd.errors import UserError
from danceopd.files import check_output_file, content_key, write_atomic
from danceopd.text import parse_yaml_documents, read_text
from pipelines.distillation import build_pipeline
from pipelines.options import PipelineOptions

ENDINGS = (".yaml", ".yml")
API = "pipelines.kubeflow.org/v2beta1"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Manifests:
    """A `Pipeline` and a `PipelineVersion` (pipelines.kubeflow.org/v2beta1) instead of kfp's own format.

    Attributes:
        namespace: the objects name; empty: wherever they are applied.
        version: name of the PipelineVersion; empty: from its content, since a version never changes.
    """

    namespace: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        for what, name in {"namespace": self.namespace, "version": self.version}.items():
            if name and not _NAME.fullmatch(name):
                raise UserError(f"{what} {name!r}: lower case letters, digits, - and ., at most 63")


def compile_pipeline(
    out: Path,
    options: PipelineOptions,
    build: Callable[[PipelineOptions], Callable] = build_pipeline,
    manifests: Manifests | None = None,
) -> Path:
    """Write a compiled pipeline, by default the whole chain's: the same options, the same bytes.

    Args:
        out: the file.
        options: how the pipeline is composed.
        build: composes it.
        manifests: write objects for kubectl; None: what KFP's API and UI take.

    Raises:
        UserError: if `out` is not named as a YAML file, or is there and something else.
    """
    place = check_output_file(out, ENDINGS, is_compiled)
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "pipeline.yaml"
        pipeline = build(options)
        if manifests is None:
            Compiler().compile(pipeline, str(package))
        else:
            names = _names(pipeline, manifests)
            Compiler().compile(
                pipeline, str(package), kubernetes_manifest_options=names, kubernetes_manifest_format=True
            )
        write_atomic(place, package.read_bytes())
        return Path(out)


def is_compiled(path: Path) -> bool:
    """Whether a file is a compiled pipeline, in either form, so that another may take its place."""
    try:
        first, *_ = parse_yaml_documents(read_text(path), str(path))
        return "pipelineInfo" in first or (first["kind"], first["apiVersion"]) == ("Pipeline", API)
    except (UserError, ValueError, LookupError, TypeError):
        return False


def _names(pipeline: BaseComponent, manifests: Manifests) -> KubernetesManifestOptions:
    specs = [MessageToDict(spec) for spec in (pipeline.pipeline_spec, pipeline.platform_spec)]
    name = pipeline.pipeline_spec.pipeline_info.name
    version = manifests.version or f"{name}-{content_key(*specs)}"
    return KubernetesManifestOptions(
        pipeline_name=name,
        pipeline_version_name=version,
        pipeline_version_display_name=version,
        namespace=manifests.namespace or None,
        include_pipeline_manifest=True,
    )
