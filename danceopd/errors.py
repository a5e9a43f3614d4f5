"""Exceptions a user is meant to read: what is wrong, where, how to mend it; or that the work was interrupted."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ends; the README's table says what each means."""

    OK = 0
    FAILED = 1  # a step, a job or a server failed; what may pass by itself is among it
    BAD_INPUT = 2  # something to mend first: the same again ends in the same way
    UNCHANGED = 3  # nothing to train
    NOT_REGISTERED = 4  # the student fails a gate
    INTERRUPTED = 75  # the same again goes on from here (EX_TEMPFAIL)
    CTRL_C = 130  # as shells have it: 128 and the signal's number
    PIPE_CLOSED = 141


class UserError(ValueError):
    """Bad input (file, row, field, image, recipe, checkpoint, flag).

    The command line prints its message on one line and exits with code 2; no traceback.
    """


class GatesFailed(RuntimeError):
    """The student fails its gates and was not registered: every step went well, and the same again ends alike."""


def unknown_name(kind: str, name: object, known: Iterable[object]) -> UserError:
    """A `UserError` for a name that is not in a table, listing the right ones."""
    return UserError(f"{kind}: {name!r} is not known; choose one of: {', '.join(sorted(map(str, known)))}")


class Interrupted(SystemExit):
    """The work was asked to end and can be resumed: the process ends with code 75 (EX_TEMPFAIL, try again)."""

    code: int

    def __init__(self, message: str):
        super().__init__(int(ExitCode.INTERRUPTED))
        self.message = message

    def __str__(self) -> str:
        return self.message


# What libraries raise for a file, a server or a store that is not as it should be. By name: most are slow to import.
_MENDABLE = {
    "builtins.OSError",
    "builtins.UnicodeError",
    "builtins.EOFError",
    "builtins.MemoryError",
    "torch.OutOfMemoryError",
    "tarfile.TarError",
    "zipfile.BadZipFile",
    "zlib.error",
    "_lzma.LZMAError",
    "json.decoder.JSONDecodeError",
    "yaml.error.YAMLError",
    "pyarrow.lib.ArrowException",
    "safetensors._safetensors_rust.SafetensorError",
    "sqlite3.Error",
    "sqlalchemy.exc.SQLAlchemyError",
    "mlflow.exceptions.MlflowException",
    "requests.exceptions.RequestException",
    "urllib3.exceptions.HTTPError",
    "http.client.HTTPException",
    "httpx.HTTPError",
    "httpx2.HTTPError",
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.BotoCoreError",
    "huggingface_hub.errors.HfHubHTTPError",
    "kfp_server_api.exceptions.OpenApiException",
    "kubernetes.client.exceptions.OpenApiException",
    "dvc.exceptions.DvcException",
}
_HINTS = {
    errno.ENOSPC: "free some space and run it again",
    errno.EDQUOT: "free some space and run it again",
    errno.EACCES: "give the user of this process access",
    errno.EPERM: "give the user of this process access",
    errno.EROFS: "name a place that can be written to",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "remove the link that leads to itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOTDIR: "a file stands where a folder is expected",
    errno.EISDIR: "a folder stands where a file is expected",
    errno.EEXIST: "something is there already",
}


# Of these the same command may go well a little later.
_PASSING = {
    "builtins.ConnectionError",
    "builtins.TimeoutError",
    "socket.gaierror",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.HTTPError",
    "httpx.TransportError",
    "httpx2.TransportError",
    "aiohttp.client_exceptions.ClientConnectionError",
}


def mendable(error: BaseException) -> tuple[str, ExitCode] | None:
    """One line and an exit code for an error that a user can mend, though no check foresaw it; None for a bug.

    A full disk, a name that is too long, a damaged archive, a locked database, a server that does not answer. What may
    pass by itself gets `FAILED`, failed gates `NOT_REGISTERED`, everything else `BAD_INPUT`.
    """
    if "Symlink loop" in str(error) and isinstance(error.__context__, OSError):  # pathlib's, a RuntimeError
        error = error.__context__
    names = _names(error)
    if type(error) is ValueError and "embedded null" in str(error):
        return "a name holds a NUL character; write it without", ExitCode.BAD_INPUT
    if isinstance(error, UserError):
        return " ".join(str(error).split()), ExitCode.BAD_INPUT
    if isinstance(error, GatesFailed):
        return " ".join(str(error).split()), ExitCode.NOT_REGISTERED
    if not names & _MENDABLE:
        return None
    return _one_line(error, names), ExitCode.FAILED if names & _PASSING else ExitCode.BAD_INPUT


def _names(error: BaseException) -> set[str]:
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}


def _one_line(error: BaseException, names: set[str]) -> str:
    if isinstance(error, OSError) and error.strerror:
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        hint = _HINTS.get(error.errno or 0)
        said = error.strerror + (f"; {hint}" if hint else "")
        return " ".join(f"{' -> '.join(places)}: {said}".removeprefix(": ").split())
    if isinstance(error, MemoryError) or "torch.OutOfMemoryError" in names:
        return "out of memory; make the batch or the pictures smaller, or use a machine with more"
    text = " ".join(str(error).split())[:500]
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind
