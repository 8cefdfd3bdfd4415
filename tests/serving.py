"""A server on this machine that can misbehave, for what is fetched over HTTP."""

import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = bytes(range(256)) * 12_000  # 3 MB: more than one of the downloader's pieces
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MD5 = "crc32c=AAAAAA==,md5=" + base64.b64encode(hashlib.md5(CONTENT).digest()).decode()  # as Google's storage has it


@dataclass
class Server:
    """What the server on this machine does, and which ranges it was asked for."""

    url: str = ""
    content: bytes = CONTENT
    files: dict[str, bytes] = field(default_factory=dict)  # what it has under other names than that of `url`
    ranges: bool = True  # answers Range requests
    length: bool = True  # sends Content-Length
    stop_after: int | None = None  # closes the connection after so many bytes
    status: int | None = None  # answers this and nothing else
    hashes: tuple[str, ...] = ()  # an x-goog-hash line for each
    announced: int | None = None  # the length that it announces; None: the right one
    asked: list[str | None] = field(default_factory=list)
    asked_for: list[str] = field(default_factory=list)  # the names

    def has(self, path: str) -> bytes:
        return self.files.get(path.removeprefix("/"), self.content)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, behaviour: Server, *arguments: object) -> None:
        self.behaviour = behaviour
        super().__init__(*arguments)

    def do_GET(self) -> None:
        server = self.behaviour
        asked = self.headers.get("Range")
        server.asked.append(asked)
        server.asked_for.append(self.path.removeprefix("/"))
        if server.status:
            self.send_error(server.status)
            return
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        content = server.has(self.path)
        if start >= len(content):
            self.send_error(416)
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if server.stop_after is None else body[: server.stop_after])

    def do_HEAD(self) -> None:
        server = self.behaviour
        if server.status:
            self.send_error(server.status)
            return
        self.send_response(200)
        for line in server.hashes:
            self.send_header("x-goog-hash", line)
        if server.length:
            self.send_header("Content-Length", str(server.announced or len(server.has(self.path))))
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Silence."""


@contextmanager
def serving() -> Iterator[Server]:
    behaviour = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, behaviour))
    behaviour.url = f"http://127.0.0.1:{http.server_port}/weights.bin"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield behaviour
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
