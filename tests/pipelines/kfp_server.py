"""A small HTTP server that behaves like the Kubeflow Pipelines API (v2beta1) for the calls used.

It keeps experiments, pipelines with versions, runs and recurring runs; filters by name; answers 400, 403, 404 and 409
as the API does; and can be told to fail: an HTTP error, a page, or a dropped connection. A run goes through the states
that a test gives it, one each time it is looked at.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml
from typer.testing import CliRunner

from pipelines.cli import app

ROOT = "/apis/v2beta1/"
DROP, PAGE = "drop", "page"
IDS = {
    "experiments": "experiment_id",
    "runs": "run_id",
    "recurringruns": "recurring_run_id",
    "pipelines": "pipeline_id",
    "versions": "pipeline_version_id",
}


class KfpServer:
    """The state behind the server.

    Attributes:
        namespaces: of its users; empty: a server with one user.
        kept: by kind, what was made, in order.
        progress: what a run's state and tasks are, one entry a look; the last stays.
        act: what happens in a run, before each look.
        faults: by (method, kind): what the next such requests meet, a status with a message, DROP or PAGE.
        calls: (verb, kind) of every request.
        headers: of the last request.
    """

    def __init__(self, namespaces: tuple[str, ...] = ()):
        self.namespaces = namespaces
        self.kept: dict[str, list[dict]] = {kind: [] for kind in IDS}
        self.progress: list[tuple[str, dict[str, str]]] = [("SUCCEEDED", {})]
        self.act: Callable[[], object] = lambda: None
        self.faults: dict[tuple[str, str], list] = {}
        self.calls: list[tuple[str, str]] = []
        self.headers: dict[str, str] = {}

    def make(self, kind: str, entry: dict) -> dict:
        entry |= {IDS[kind]: f"{kind}-{len(self.kept[kind]) + 1}", "created_at": "2026-01-01T00:00:00Z"}
        self.kept[kind].append(entry)
        return entry

    def fail(self, method: str, kind: str, *answers) -> None:
        """What the next requests of this kind meet."""
        self.faults.setdefault((method, kind), []).extend(answers)

    def look(self, run: dict) -> dict:
        """A run as it is now."""
        self.act()
        state, tasks = self.progress.pop(0) if len(self.progress) > 1 else self.progress[0]
        details = [
            {
                "run_id": run["run_id"],
                "task_id": f"{n}",
                "display_name": name,
                "state": task.split(": ")[0],
                **({"error": {"code": 2, "message": task.split(": ")[1]}} if ": " in task else {}),
            }
            for n, (name, task) in enumerate(tasks.items())
        ]
        run |= {"state": state, "run_details": {"task_details": details}}
        return run


@contextmanager
def serve(state: KfpServer) -> Iterator[str]:
    """The server's address, while the block runs."""
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Refused(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client to acknowledge its head
    state: KfpServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_DELETE(self):
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.headers = {name.lower(): value for name, value in self.headers.items()}
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts, _, act = url.path.removeprefix(ROOT).partition(":")
        parts = parts.split("/")
        kind = "versions" if "versions" in parts or parts[-1] == "upload_version" else parts[0]
        fault = (self.state.faults.get((method, kind)) or [None]).pop(0)
        if isinstance(fault, tuple):
            return self._send(fault[0], {"error": fault[1], "code": 7, "message": fault[1]})
        if fault == PAGE:
            return self._send(200, "<html>Log in</html>", "text/html")
        if fault == DROP and method == "GET":
            return self._hang_up()
        try:
            if not url.path.startswith(ROOT):
                raise _Refused(404, "Not Found")
            found = self._do(method, kind, parts, act, query, body)
        except _Refused as error:
            status, message = error.args
            return self._send(status, {"error": message, "code": 3, "message": message})
        return self._hang_up() if fault == DROP else self._send(200, found)

    def _do(self, method: str, kind: str, parts: list[str], act: str, query: dict, body: bytes) -> dict:
        state = self.state
        if kind == "healthz":
            return {"multi_user": bool(state.namespaces)}
        verb = {"GET": "get" if len(parts) in (2, 4) else "list", "POST": act or "create", "DELETE": "delete"}[method]
        state.calls.append((verb, kind))
        if parts[-1].startswith("upload"):
            return self._upload(parts[-1], query, body)
        if verb == "list":
            return self._list(kind, parts, query)
        if verb == "create":
            return self._create(kind, json.loads(body))
        entry = next((e for e in state.kept[kind] if e[IDS[kind]] == parts[-1]), None)
        if entry is None:
            raise _Refused(404, f"{kind} {parts[-1]} not found")
        if verb == "delete":
            state.kept[kind].remove(entry)
        elif verb in ("disable", "enable"):
            entry |= {"status": verb.upper() + "D", "mode": verb.upper()}
        return state.look(entry) if (verb, kind) == ("get", "runs") else entry if verb == "get" else {}

    def _namespace(self, name: str | None) -> None:
        if self.state.namespaces and not name:
            raise _Refused(400, "Invalid input error: a namespace is needed")
        if self.state.namespaces and name not in self.state.namespaces:
            raise _Refused(403, f"User 'me' is not authorized in namespace {name}")
        if name and not self.state.namespaces:
            raise _Refused(400, "In single-user mode, the request shouldn't contain a namespace")

    def _list(self, kind: str, parts: list[str], query: dict) -> dict:
        if kind != "versions" and "experiment_id" not in query:
            self._namespace(query.get("namespace"))
        found = list(self.state.kept[kind])
        if kind == "versions":
            found = [e for e in reversed(found) if e["pipeline_id"] == parts[1]]
        if query.get("sort_by") == "created_at desc" and kind == "runs":
            found.reverse()
        if "filter" in query:
            [predicate] = json.loads(query["filter"])["predicates"]
            assert predicate["operation"] in (1, "EQUALS") and predicate["key"] == "display_name"
            found = [e for e in found if e["display_name"] == predicate["stringValue"]]
        start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 10)
        more = {"next_page_token": str(start + size)} if start + size < len(found) else {}
        name = {"recurringruns": "recurringRuns", "versions": "pipeline_versions"}.get(kind, kind)
        return {name: found[start : start + size], "total_size": len(found), **more}

    def _create(self, kind: str, entry: dict) -> dict:
        if kind == "experiments":
            self._namespace(entry.get("namespace"))
        elif entry["experiment_id"] not in [e["experiment_id"] for e in self.state.kept["experiments"]]:
            raise _Refused(404, "experiment not found")
        if kind == "recurringruns" and len(entry["trigger"]["cron_schedule"]["cron"].split()) != 6:
            raise _Refused(400, "Schedule cron is not supported")
        first = {"runs": {"state": "PENDING"}, "recurringruns": {"status": entry.get("mode", "") + "D"}}
        return self.state.make(kind, entry | first.get(kind, {}))

    def _upload(self, how: str, query: dict, body: bytes) -> dict:
        content = re.search(rb"\r\n\r\n(.*?)\r\n--", body, re.DOTALL)[1]
        spec, *platform = yaml.safe_load_all(content)
        if "pipelineInfo" not in spec:
            raise _Refused(400, "Invalid input error: unknown template format")
        whole = {"pipeline_spec": spec, "platform_spec": platform[0]} if platform else spec
        name = query["name"]
        if how == "upload":
            self._namespace(query.get("namespace"))
            if name in [p["display_name"] for p in self.state.kept["pipelines"]]:
                raise _Refused(409, f"The name {name} already exist")
            made = self.state.make("pipelines", {"display_name": name})
            self.state.make(
                "versions", {"pipeline_id": made["pipeline_id"], "display_name": name, "pipeline_spec": whole}
            )
            return made
        if name in [v["display_name"] for v in self.state.kept["versions"]]:
            raise _Refused(409, f"The version {name} already exist")
        version = {"pipeline_id": query["pipelineid"], "display_name": name, "pipeline_spec": whole}
        return self.state.make("versions", version)

    def _send(self, status: int, body, content: str = "application/json") -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", content)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _hang_up(self) -> None:
        self.close_connection = True


# ---------------------------------------------------------------------------------------------------------- by command


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def good(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str, code: int = 2) -> str:
    """The one line on stderr of a command that ends so."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("danceopd: ") and result.stderr.count("\n") == 1
    return result.stderr
