"""A small HTTP server that behaves like the Kubernetes API for the calls used: real requests, no cluster.

It keeps objects with uids and resource versions, answers 404, 409 and 422 as the API does, streams watches and logs in
chunks, and can be told to fail: an HTTP error, a dropped connection, a watch that is too old. There are no controllers:
a test plays them, as a list of acts, one of which is done whenever a client starts to watch.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from strict_fields import unknown_field

PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)
DROP = "drop"


class ApiServer:
    """The state behind the server.

    Attributes:
        objects: by (plural, name).
        logs: text of each pod's log, by name.
        acts: what the controllers do next, one a watch.
        faults: by (verb, plural): what the next such requests meet, a status with a message, or DROP.
        calls: (group, resource, verb) of every request.
        kinds: plurals that exist.
        lingering: requests a deleted object stays for, as with foreground deletion.
        groups: API groups that are served, with their versions.
        rights: (account, group, resource, verb) that are granted, for reviews.
        dying: requests for pods during which those of a deleted object stay.
    """

    def __init__(self, namespace: str = "danceopd"):
        self.namespace = namespace
        self.objects: dict[tuple[str, str], dict] = {}
        self.logs: dict[str, list[str]] = {}
        self.acts: list[Callable[[], object]] = []
        self.faults: dict[tuple[str, str], list] = {}
        self.calls: list[tuple[str, str, str]] = []
        self.kinds = {"jobs", "trainjobs", "pods", "events", "services", "workflows", "workloads"}
        self.lingering = 0
        self.dying = 0
        self.groups: dict[str, list[str]] = {"apps": ["v1"], "batch": ["v1"]}
        self.rights: set[tuple[str, str, str, str]] = set()
        self.watch_events: list[dict] = []
        self.version = 100
        self.changed = threading.Condition(threading.RLock())
        self.now = 0

    def put(self, plural: str, document: dict) -> dict:
        """Make or change an object, and tell those who watch."""
        with self.changed:
            self.version += 1
            metadata = document["metadata"]
            metadata.setdefault("uid", f"uid-{self.version}")
            metadata.setdefault("creationTimestamp", f"2026-01-01T00:{self.version // 60:02}:{self.version % 60:02}Z")
            metadata["resourceVersion"] = str(self.version)
            self.objects[plural, metadata["name"]] = document
            self.changed.notify_all()
            return document

    def remove(self, plural: str, name: str) -> dict | None:
        """Take an object away, with what it owns."""
        with self.changed:
            gone = self.objects.pop((plural, name), None)
            if gone is not None:
                uid = gone["metadata"]["uid"]
                owned = [
                    key
                    for key, o in self.objects.items()
                    if any(r["uid"] == uid for r in o["metadata"].get("ownerReferences", []))
                ]
                for key in owned:
                    if key[0] == "pods" and self.dying:
                        self.objects[key]["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
                    else:
                        self.remove(*key)
            self.changed.notify_all()
            return gone

    def of(self, plural: str) -> list[dict]:
        """All objects of a kind."""
        return [o for (kind, _), o in self.objects.items() if kind == plural]

    def forbid(self, verb: str, plural: str, resource: str = "") -> None:
        """Let the next such request meet a missing right (1.34, apiserver/pkg/endpoints/handlers/responsewriters)."""
        what = resource or plural
        said = f'{what} is forbidden: User "me" cannot {verb} resource "{what}" in API group ""'
        self.fail(verb, plural, (403, f'{said} in the namespace "{self.namespace}"'))

    def fail(self, verb: str, plural: str, *answers) -> None:
        """What the next requests of this kind meet."""
        self.faults.setdefault((verb, plural), []).extend(answers)

    # ------------------------------------------------------------------------------------------------- what tests play

    def job(self, name: str, plural: str = "jobs", **status) -> None:
        """Set a job's status, as its controller would."""
        job = self.objects[plural, name]
        job["status"] = {**job.get("status", {}), **status}
        self.put(plural, job)

    def condition(self, name: str, kind: str, plural: str = "jobs", **more) -> None:
        """End a job: Complete or Failed."""
        self.job(name, plural, conditions=[{"type": kind, "status": "True", **more}])

    def pod(
        self, job: str, index: int = 0, phase: str = "Running", plural: str = "jobs", name: str = "", **status
    ) -> dict:
        """Make or change one of a job's pods."""
        owner = self.objects[plural, job]["metadata"]
        label = "batch.kubernetes.io/job-name" if plural == "jobs" else "jobset.sigs.k8s.io/jobset-name"
        name = name or f"{job}-{index}"
        states = {"Running": {"running": {}}, "Succeeded": {"terminated": {"exitCode": 0}}, "Pending": {}, "Failed": {}}
        status = {
            "phase": phase,
            "containerStatuses": [
                {
                    "name": "danceopd",
                    "image": "danceopd:dev",
                    "imageID": "",
                    "ready": True,
                    "restartCount": 0,
                    "state": states[phase],
                }
            ],
        } | status
        labels = {label: job, "batch.kubernetes.io/job-completion-index": str(index)}
        limits = {"memory": "16Gi", "nvidia.com/gpu": "8"}
        old = self.objects.get(("pods", name))
        metadata = (
            old["metadata"]
            if old
            else {
                "name": name,
                "labels": labels,
                "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": owner["uid"]}],
            }
        )
        spec = {"containers": [{"name": "danceopd", "resources": {"limits": limits}}]}
        return self.put("pods", {"metadata": metadata, "spec": spec, "status": status})

    def ended(self, job: str, code: int, reason: str = "Error", message: str = "", **more) -> None:
        """End a job's pod with an exit code."""
        state = {"terminated": {"exitCode": code, "reason": reason, "message": message}}
        container = {"name": "danceopd", "image": "danceopd:dev", "imageID": "", "ready": False, "restartCount": 0}
        self.pod(job, phase="Failed", containerStatuses=[{**container, "state": state}], **more)

    def workload(self, job: str, plural: str = "jobs", **condition) -> None:
        """What Kueue makes for a job, and its condition QuotaReserved (0.15, pkg/workload/workload.go)."""
        uid = self.objects[plural, job]["metadata"]["uid"]
        metadata = {"name": f"{plural[:-1]}-{job}-0a1b2", "labels": {"kueue.x-k8s.io/job-uid": uid}}
        held = {"type": "QuotaReserved", "status": "False", "reason": "Pending", **condition}
        self.put("workloads", {"metadata": metadata, "status": {"conditions": [held]}})

    def event(self, about: str, reason: str, message: str) -> None:
        """A warning."""
        self.put(
            "events",
            {
                "metadata": {"name": f"{about}.{self.version}"},
                "reason": reason,
                "message": message,
                "type": "Warning",
                "involvedObject": {"name": about, "namespace": self.namespace},
            },
        )

    def say(self, pod: str, *lines: str) -> None:
        """Add to a pod's log."""
        with self.changed:
            for line in lines:
                self.now += 1
                stamp = f"2026-01-01T00:00:{self.now // 1000:02}.{self.now % 1000:03}000000Z"
                self.logs.setdefault(pod, []).append(f"{stamp} {line}")
            self.changed.notify_all()


def running_server(state: ApiServer) -> ThreadingHTTPServer:
    """Serve it on a free port; the caller shuts it down."""
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@contextmanager
def serve(state: ApiServer) -> Iterator[str]:
    """The server's address, while the block runs."""
    server = running_server(state)
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client to acknowledge its head
    state: ApiServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path in ("/version/", "/apis/"):
            return self._send(200, self._about())
        path, query = self._path()
        if path["sub"] == "log":
            self._note(path, "get", "pods/log")
            return self._faulty("get", "log") or self._log(path["name"], query)
        if path["name"]:
            self._note(path, "get")
            return self._faulty("get", path["plural"]) or self._one(path)
        verb = "watch" if query.get("watch") in ("true", "True") else "list"
        self._note(path, verb)
        if verb == "watch":
            with self.state.changed:
                if self.state.acts:
                    self.state.acts.pop(0)()
            return self._faulty(verb, path["plural"]) or self._watch(path, query)
        return self._faulty(verb, path["plural"]) or self._list(path, query)

    def do_POST(self):
        path, _ = self._path()
        self._note(path, "create")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self._fault("create", path["plural"])
        if fault is not None and fault != DROP:
            return self._refuse(*fault)
        if path["plural"] == "localsubjectaccessreviews":
            return self._send(201, body | {"status": {"allowed": self._allowed(body["spec"])}})
        query = self._path()[1]
        with self.state.changed:
            if self._unknown(path):
                return None
            misspelt = unknown_field(body) if query.get("fieldValidation") == "Strict" else ""
            if misspelt:
                text = f'strict decoding error: unknown field "{misspelt}"'
                return self._refuse(400, f"{body['kind']} in version {body['apiVersion']!r} cannot be handled: {text}")
            name = body["metadata"]["name"]
            if (path["plural"], name) in self.state.objects:
                return self._refuse(409, f'{path["plural"]} "{name}" already exists')
            made = self.state.put(path["plural"], body)
        if fault == DROP:  # it is made, but the answer gets lost
            return self._hang_up()
        return self._send(201, made)

    def do_DELETE(self):
        path, _ = self._path()
        self._note(path, "delete")
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if self._faulty("delete", path["plural"]):
            return None
        with self.state.changed:
            found = self.state.objects.get((path["plural"], path["name"]))
            if found is None:
                return self._missing(path)
            wanted = body.get("preconditions", {}).get("uid")
            if wanted and wanted != found["metadata"]["uid"]:
                return self._refuse(409, "the UID in the precondition does not match")
            if path["plural"] == "trainjobs" and body.get("propagationPolicy") == "Foreground":
                # Kubeflow Trainer 2.2 (pkg/controller/trainjob_controller.go) reconciles what is being deleted too.
                self.state.pod(path["name"], plural="trainjobs", name=f"{path['name']}-made-anew")
            if self.state.lingering:
                found["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
            else:
                self.state.remove(path["plural"], path["name"])
        return self._send(200, {"kind": "Status", "status": "Success"})

    # ---------------------------------------------------------------------------------------------------------- answers

    def _path(self):
        split = urlsplit(self.path)
        path = PATH.fullmatch(split.path)
        return path.groupdict(), {key: values[0] for key, values in parse_qs(split.query).items()}

    def _about(self) -> dict:
        if self.path == "/version/":
            plain = ("gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform")
            return {name: "" for name in plain} | {"major": "1", "minor": "34", "gitVersion": "v1.34.9"}
        groups = [
            {"name": name, "versions": [{"groupVersion": f"{name}/{v}", "version": v} for v in versions]}
            for name, versions in self.state.groups.items()
        ]
        return {"kind": "APIGroupList", "groups": groups}

    def _allowed(self, spec: dict) -> bool:
        asked = spec["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        account = spec["user"].rpartition(":")[2]
        return (account, asked.get("group", ""), resource, asked["verb"]) in self.state.rights

    def _note(self, path: dict, verb: str, resource: str = "") -> None:
        self.state.calls.append((path["group"] or "", resource or path["plural"], verb))

    def _fault(self, verb: str, plural: str):
        waiting = self.state.faults.get((verb, plural))
        return waiting.pop(0) if waiting else None

    def _faulty(self, verb: str, plural: str) -> bool:
        fault = self._fault(verb, plural)
        if fault is None:
            return False
        if fault == DROP:
            self._hang_up()
        elif fault == "gone":  # as an event within a watch that began well
            self._chunks(
                [
                    json.dumps(
                        {
                            "type": "ERROR",
                            "object": {"code": 410, "reason": "Expired", "message": "too old resource version"},
                        }
                    )
                    + "\n"
                ]
            )
        elif fault == "half a line":
            self._chunks(['{"type": "MODIFIED", "obj'], broken=True)
        else:
            self._refuse(*fault)
        return True

    def _unknown(self, path: dict) -> bool:
        if path["plural"] not in self.state.kinds:
            self._send(404, None, text="404 page not found\n")
        elif path["namespace"] not in (None, self.state.namespace):
            self._refuse(404, f'namespaces "{path["namespace"]}" not found')
        else:
            return False
        return True

    def _one(self, path: dict):
        with self.state.changed:
            if path["plural"] not in self.state.kinds:
                return self._send(404, None, text="404 page not found\n")
            found = self.state.objects.get((path["plural"], path["name"]))
            if found is None or path["namespace"] not in (None, self.state.namespace):
                return self._missing(path)
            answer = json.loads(json.dumps(found))
            if "deletionTimestamp" in found["metadata"]:
                self.state.lingering -= 1
                if self.state.lingering <= 0:
                    self.state.remove(path["plural"], path["name"])
        return self._send(200, answer)

    def _missing(self, path: dict):
        return self._refuse(404, f'{path["plural"]} "{path["name"]}" not found')

    def _matching(self, path: dict, query: dict) -> list[dict]:
        here = path["namespace"] in (None, self.state.namespace)
        objects = self.state.of(path["plural"]) if here else []
        for part in filter(None, query.get("labelSelector", "").split(",")):
            key, _, value = part.partition("=")
            objects = [o for o in objects if o["metadata"].get("labels", {}).get(key) == value]
        field, _, value = query.get("fieldSelector", "").partition("=")
        if field == "metadata.name":
            objects = [o for o in objects if o["metadata"]["name"] == value]
        return objects

    def _list(self, path: dict, query: dict):
        with self.state.changed:
            if path["plural"] not in self.state.kinds:
                return self._send(404, None, text="404 page not found\n")
            items = json.loads(json.dumps(self._matching(path, query)))
            if path["plural"] == "pods" and self.state.dying:
                self.state.dying -= 1
                ending = [p for p in self.state.of("pods") if "deletionTimestamp" in p["metadata"]]
                for pod in ending if not self.state.dying else ():
                    self.state.remove("pods", pod["metadata"]["name"])
            return self._send(200, {"items": items, "metadata": {"resourceVersion": str(self.state.version)}})

    def _watch(self, path: dict, query: dict):
        since, until = int(query.get("resourceVersion") or 0), time.monotonic() + float(query.get("timeoutSeconds", 1))
        lines = []
        with self.state.changed:
            while not lines and time.monotonic() < until:
                fresh = [o for o in self._matching(path, query) if int(o["metadata"]["resourceVersion"]) > since]
                lines = [json.dumps({"type": "MODIFIED", "object": o}) + "\n" for o in fresh]
                if not lines:
                    self.state.changed.wait(0.02)
                    if not self._matching(path, query):
                        break
        return self._chunks(lines)

    def _log(self, pod: str, query: dict):
        stamped = query.get("timestamps") in ("true", "True")
        follow = query.get("follow") in ("true", "True")
        self._head()
        sent = 0
        while True:
            with self.state.changed:
                lines = self.state.logs.get(pod, [])[sent:]
                found = self.state.objects.get(("pods", pod))
                over = found is None or found["status"]["phase"] in ("Succeeded", "Failed") or not follow
                if not lines and not over:
                    self.state.changed.wait(0.02)
            for line in lines:
                self._chunk((line if stamped else line.partition(" ")[2]) + "\n")
                sent += 1
                if self._fault("get", "log line") == DROP:
                    return self._hang_up()
            if over and not lines:
                return self._chunk("")

    def _send(self, code: int, document: dict | None, text: str = ""):
        body = (text or json.dumps(document)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if text else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, code: int, message: str):
        self._send(code, {"kind": "Status", "status": "Failure", "code": code, "message": message})

    def _head(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, text: str):
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _chunks(self, lines: list[str], broken: bool = False):
        self._head()
        for line in lines:
            self._chunk(line)
        if broken:
            return self._hang_up()
        return self._chunk("")

    def _hang_up(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)
