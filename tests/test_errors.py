"""Errors that a user can mend become one line, whichever library raises them; bugs stay bugs."""

from __future__ import annotations

import errno
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danceopd.errors import ExitCode, UserError, mendable


def raised(action, *arguments):
    with pytest.raises(BaseException) as caught:
        action(*arguments)
    return caught.value


def open_file(folder, name):
    return open(folder / name, "rb")


def linked(folder):
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def refused_connection():
    import requests

    requests.get("http://127.0.0.1:9/", timeout=1)


def closed_store():
    from mlflow.exceptions import MlflowException

    raise MlflowException("Invalid model name 'a/b'.\nNames cannot contain '/'.")


def damaged_weights(folder):
    from safetensors import safe_open

    (folder / "w.safetensors").write_bytes(b"\x00" * 20)
    with safe_open(folder / "w.safetensors", framework="np"):
        pass


def no_database(folder):
    (folder / "x.db").write_text("no database at all" * 10)
    sqlite3.connect(folder / "x.db").execute("select * from t")


def no_database_by_url(folder):
    import sqlalchemy

    (folder / "y.db").write_text("no database at all" * 10)
    with sqlalchemy.create_engine(f"sqlite:///{folder / 'y.db'}").connect() as connection:
        connection.execute(sqlalchemy.text("select * from t"))


CASES = {
    "missing": (lambda f: open_file(f, "gone"), "gone: No such file or directory"),
    "folder": (lambda f: open_file(f, "."), "Is a directory"),
    "too long": (lambda f: open_file(f, "x" * 300), "File name too long; give a shorter name"),
    "a link to itself": (lambda f: linked(f).resolve(), "loop: Too many levels of symbolic links; remove the link"),
    "a NUL": (lambda f: open_file(f, "a\0b"), "a name holds a NUL character"),
    "disk full": (lambda f: Path("/dev/full").write_text("x" * 100_000), "No space left on device"),
    "encoding": (lambda f: b"\xe9".decode("utf-8"), "UnicodeDecodeError: 'utf-8' codec"),
    "surrogate": (lambda f: "\ud800".encode(), "UnicodeEncodeError: 'utf-8' codec"),
    "tar": (lambda f: tarfile.open(fileobj=io.BytesIO(b"x" * 600)).close(), "ReadError"),
    "zip": (lambda f: zipfile.ZipFile(io.BytesIO(b"x" * 600)), "BadZipFile: File is not a zip file"),
    "gzip": (lambda f: gzip.decompress(b"\x1f\x8b\x08"), "EOFError"),
    "zlib": (lambda f: zlib.decompress(b"x"), "error: Error -"),
    "xz": (lambda f: lzma.decompress(b"x"), "LZMAError"),
    "json": (lambda f: json.loads("{"), "JSONDecodeError"),
    "parquet": (lambda f: pq.read_table(io.BytesIO(b"PAR1xxxxPAR1")), "Arrow"),
    "arrow": (lambda f: pa.array(["x"]).cast(pa.int32()), "ArrowInvalid"),
    "sqlite": (no_database, "DatabaseError: file is not a database"),
    "sqlalchemy": (no_database_by_url, "DatabaseError: (sqlite3.DatabaseError) file is not a database"),
    "mlflow": (lambda f: closed_store(), "MlflowException: Invalid model name 'a/b'. Names cannot contain '/'."),
    "safetensors": (damaged_weights, "SafetensorError"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_librarys_error_is_one_line(tmp_path, name):
    action, message = CASES[name]
    told, code = mendable(raised(action, tmp_path))
    assert message in told
    assert "\n" not in told
    assert code == ExitCode.BAD_INPUT


def test_what_may_pass_has_another_code():
    told, code = mendable(raised(refused_connection))
    assert code == ExitCode.FAILED
    assert "127.0.0.1" in told
    assert mendable(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))[1] == ExitCode.FAILED


def test_our_own_line_is_kept_and_a_bug_stays_a_bug():
    assert mendable(UserError("a:\n  b")) == ("a: b", ExitCode.BAD_INPUT)
    for bug in (KeyError("x"), ValueError("x"), TypeError("x"), AssertionError(), RuntimeError("x"), RecursionError()):
        assert mendable(bug) is None
