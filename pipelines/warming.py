"""Bytecode of what the steps import, written while the first of them leave a core idle.

`make run` has pip compile nothing: a run imports a quarter of what is installed. In a fresh environment the first
imports of torch, diffusers and MLflow therefore take some ten seconds more.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from danceopd.devices import usable_cores

# In the order in which the steps need them.
IMPORTED = ("danceopd.backbones.flux2_klein", "danceopd.finetune", "danceopd.distill", "danceopd.evaluation.report")
LAST = "mlflow"
_IMPORT = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"


def is_compiled(package: str) -> bool:
    """Whether a package has been imported with its bytecode kept, or never will be."""
    spec = importlib.util.find_spec(package)
    return spec is None or spec.cached is None or Path(spec.cached).is_file()


@contextmanager
def warm_imports(modules: Sequence[str] = IMPORTED, last: str = LAST) -> Iterator[subprocess.Popen | None]:
    """Import modules in a process of its own beside the block, if that has not been done here and a core is free.

    Args:
        modules: what to import, in this order.
        last: a package to import after them; its bytecode says that all was done.

    Yields:
        The process, which the block's end ends; None where there is nothing to do.
    """
    if sys.dont_write_bytecode or usable_cores() < 2 or is_compiled(last):
        yield None
        return
    command = [sys.executable, "-c", _IMPORT, *modules, last]
    silent = subprocess.DEVNULL  # what cannot be imported is told by the step that needs it
    with subprocess.Popen(command, stdin=silent, stdout=silent, stderr=silent) as process:
        try:
            yield process
        finally:
            process.terminate()
