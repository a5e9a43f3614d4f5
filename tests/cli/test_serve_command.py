"""`danceopd serve` as a process: it starts, draws, and ends quietly on SIGTERM; and what it refuses to start with."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from danceopd.cli import main as cli
from danceopd.errors import UserError
from danceopd.inference.generate import Sample, encode_picture, open_student


@pytest.mark.slow
def test_it_serves_until_it_is_told_to_stop(student_pipeline, tmp_path):
    command = [sys.executable, "-m", "danceopd", "serve", str(student_pipeline), "--port", "0", "--steps", "2"]
    environment = os.environ | {"DANCEOPD_API_KEY": "secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as process:
        try:
            url = process.stdout.readline().strip()  # said when the model is there
            assert url.startswith("http://127.0.0.1:")
            request = urllib.request.Request(
                url + "v1/images/generations",
                json.dumps({"prompt": "red ring", "seed": 4}).encode(),
                {"Content-Type": "application/json", "Authorization": "Bearer secret"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                [item] = json.load(answer)["data"]
            [wanted] = open_student(student_pipeline).draw_samples([Sample("red ring", (), 4, 2)])
            assert base64.b64decode(item["b64_json"]) == encode_picture(wanted)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err and "secret" not in err and "red ring" not in err
    assert err.rstrip().endswith("stopped")


@pytest.mark.parametrize(
    ("arguments", "key", "words"),
    [
        (["nowhere"], None, "nowhere: no danceopd.json there"),
        (["MODEL", "--steps", "60"], None, "--steps 60 is more than --max-steps 50"),
        (["MODEL"], " ", "DANCEOPD_API_KEY is set and empty"),
        (["MODEL", "--host", "192.0.2.1", "--port", "0"], None, "cannot listen on 192.0.2.1:0"),
        (["MODEL", "--port", "TAKEN"], None, "choose another --host or --port"),
    ],
)
def test_it_does_not_start_with_what_is_wrong(student_pipeline, monkeypatch, capsys, arguments, key, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        known = {"MODEL": str(student_pipeline), "TAKEN": str(taken.getsockname()[1])}
        monkeypatch.setattr(sys, "argv", ["danceopd", "serve", *(known.get(a, a) for a in arguments)])
        monkeypatch.delenv("DANCEOPD_API_KEY", raising=False)
        if key is not None:
            monkeypatch.setenv("DANCEOPD_API_KEY", key)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_ends_the_server(monkeypatch):
    from danceopd.serving.schema import Limits
    from danceopd.serving.server import run_server

    def load(_):
        raise UserError("these weights do not fit")

    monkeypatch.setattr(signal, "signal", lambda *_: signal.SIG_DFL)  # the test's own handlers stay
    with pytest.raises(UserError, match="these weights do not fit"):
        run_server(load, socket.create_server(("127.0.0.1", 0)), "x", Limits(), None, 1, 1, ["127.0.0.1"], lambda: None)
