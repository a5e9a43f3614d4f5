"""An OpenAI-compatible endpoint that judges pictures as it is told to, over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = {"instruction": 8, "preservation": 6, "naturalness": 9, "artifacts": 6, "reason": "fine"}


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `script`, then with `usual`; keeps what it was sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list = []
        self.usual: object = GOOD
        self.seen: list[tuple[str, dict, dict]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            said = self.server.script.pop(0) if self.server.script else self.server.usual
        if said == "drop":
            self.close_connection = True
            return
        status, headers, text = said if isinstance(said, tuple) else (200, {}, completion(said))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def completion(answer: object, usage: bool = True) -> str:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    body: dict = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return json.dumps(body | ({"usage": {"prompt_tokens": 100, "completion_tokens": 20}} if usage else {}))


@contextmanager
def serve_judge() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
