"""The student as MLflow keeps it: code, pipeline folder, and weights, which are gigabytes and are written once.

MLflow copies a model's files into a folder of its own before it stores them. The weights do not go that way: in a store
on the workspace's file system they are the student's own files under a second name, which takes no space; any other
store gets each of them by one upload, from where it lies. What is taken out of such a store takes no space either.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from danceopd.config.sampling import Sampling, read_sampling
from danceopd.export.student import PIPELINE, WEIGHT_FILES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models.model import ModelInfo

PLACE = f"artifacts/{PIPELINE}"  # where a logged model keeps the student
_WRITE = 0o222  # of a file's mode
_REQUIREMENTS = (
    "mlflow",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "pandas",
    "pillow",
    "pyarrow",
    "pydantic",
    "pyyaml",
)


def copy_without_weights(pipeline: Path, folder: Path) -> Path:
    """A copy of a pipeline folder's small files: configs, tokenizers, the card."""
    return Path(shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns(Path(WEIGHT_FILES).name)))


def log_student(mlflow: Any, client: MlflowClient, small: Path, exported: Path, workspace: Path) -> ModelInfo:
    """Log a student as a model of MLflow's active run.

    Until all its files are stored the model is pending; where one cannot be, it has failed.

    Args:
        mlflow: the module, set to the store.
        client: of the same store.
        small: the pipeline folder without weights, as it is to be registered.
        exported: the student's own pipeline folder, which has the weights.
        workspace: folder for scratch files.
    """
    params = client.get_run(mlflow.active_run().info.run_id).data.params
    model = mlflow.initialize_logged_model(name="student", params=params)
    weights = sorted(exported.glob(WEIGHT_FILES))
    try:
        _store_weights(client, model.model_id, exported, weights)
    except BaseException:
        with suppress(Exception):  # a store that is away; what went wrong first is what counts
            client.finalize_logged_model(model.model_id, "FAILED")
        raise
    with tempfile.TemporaryDirectory(dir=workspace) as scratch:
        info = _log_small(mlflow, model.model_id, small, Path(scratch))
        _state_size(mlflow, client, info, sum(file.stat().st_size for file in weights), Path(scratch))
    return info


def _store_weights(client: MlflowClient, model_id: str, exported: Path, weights: Sequence[Path]) -> None:
    folder = _local_folder(client.get_logged_model(model_id).artifact_location)
    for file in weights:
        place = Path(PLACE) / file.parent.relative_to(exported)
        if folder is None or not _link(file, folder / place / file.name):
            client.log_model_artifact(model_id, str(file), place.as_posix())


def _local_folder(location: str) -> Path | None:
    """The folder that an artifact location names, or None for one that is not on this machine."""
    parts = urlsplit(location)
    return Path(url2pathname(parts.path)) if parts.scheme in ("", "file") else None


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name; False where that cannot be: another file system, or one that knows no second names.

    From then on nobody writes into it under either name. Replacing or removing one name leaves the other as it is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        return False
    with suppress(OSError):  # another user's file
        source.chmod(stat.S_IMODE(source.stat().st_mode) & ~_WRITE)
    return True


def stored_pipeline(client: MlflowClient, model: str, version: str) -> Path | None:
    """Where a version's pipeline folder lies, if the store's files are on this machine."""
    folder = _local_folder(client.get_model_version_download_uri(model, version))
    return folder / PLACE if folder is not None and (folder / PLACE).is_dir() else None


def take_pipeline(stored: Path, folder: Path) -> Path:
    """A copy of a stored pipeline folder in `folder`, its weights under a second name where that can be."""
    return Path(shutil.copytree(stored, folder / PIPELINE, copy_function=_take))


def _take(source: str, target: str) -> None:
    file = Path(source)
    kept = file.match(WEIGHT_FILES) and not file.stat().st_mode & _WRITE  # nobody changes what was stored so
    if not (kept and _link(file, Path(target))):
        shutil.copy2(source, target)


def _log_small(mlflow: Any, model_id: str, pipeline: Path, scratch: Path) -> ModelInfo:
    from danceopd.registry import pyfunc_model

    code = scratch / "danceopd"
    shutil.copytree(Path(str(resources.files("danceopd"))), code, ignore=_all_but_code)
    return mlflow.pyfunc.log_model(
        model_id=model_id,
        python_model=pyfunc_model.__file__,
        artifacts={PIPELINE: str(pipeline)},
        code_paths=[str(code)],
        signature=pyfunc_model.signature(read_sampling(pipeline) or Sampling()),
        pip_requirements=_requirements(),
    )


def _state_size(mlflow: Any, client: MlflowClient, info: ModelInfo, weights: int, scratch: Path) -> None:
    """Let the model's description count the weights' bytes, too."""
    model = mlflow.models.Model.load(info.model_uri)
    model.model_size_bytes = (model.model_size_bytes or 0) + weights
    file = scratch / "MLmodel"
    model.save(str(file))
    client.log_model_artifact(info.model_id, str(file))


def _all_but_code(folder: str, names: list[str]) -> list[str]:
    return [n for n in names if n == "__pycache__" or not (n.endswith(".py") or (Path(folder) / n).is_dir())]


def _requirements() -> list[str]:
    """The packages a served student needs, as installed here; a build's local label is left out."""
    return [f"{name}=={installed_version(name).split('+')[0]}" for name in _REQUIREMENTS]
