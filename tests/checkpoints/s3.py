"""A real S3 server, in a process of its own on loopback, and a proxy before it that fails when it is told to."""

import contextlib
import http.client
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest

PART_BYTES = 5 << 20  # the smallest part of an upload that S3 takes
Fault = Callable[[str, str], int]  # (method, path with query) -> the HTTP status to answer, 0 to let it through


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def s3_process(log: Path, limit_s: float = 60) -> Iterator[str]:
    """The endpoint of an S3 server (moto's) that lives as long as the block."""
    port = free_port()
    with open(log, "wb") as out:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        end = time.monotonic() + limit_s
        while not _listens(port):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the S3 server did not start: {log.read_text()}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def set_up_s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user of that server; the client tries once, so that exfm's own retries are what is tested."""
    settings = {"ENDPOINT_URL_S3": endpoint, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
    settings |= {"DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true", "MAX_ATTEMPTS": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")


def new_bucket() -> str:
    url = f"s3://bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(url)
    return url


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to an S3 server, but answers those with an error for which `fault` names a status."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = endpoint.removeprefix("http://")
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.fault: Fault = lambda method, path: 0
        self.failed: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def times(self, count: int, status: int, wanted: Fault = lambda method, path: 1) -> None:
        """Answer the next `count` requests that are wanted with the status."""
        left = [status] * count
        self.fault = lambda method, path: left.pop() if left and wanted(method, path) else 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy
    CODES: ClassVar = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown", 507: "InsufficientStorage"}

    def answer(self) -> None:
        body = self._body()
        status = self.server.fault(self.command, self.path)
        if status:
            self.server.failed.append((self.command, self.path))
            code = self.CODES[status]
            payload = f"<Error><Code>{code}</Code><Message>told to answer {code}</Message></Error>".encode()
            self._send(status, [("Content-Type", "application/xml")], payload)
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        upstream.request(self.command, self.path, body, dict(self.headers))
        got = upstream.getresponse()
        payload = got.read()
        dropped = ("content-length", "transfer-encoding", "connection")
        headers = [(k, v) for k, v in got.getheaders() if k.lower() not in dropped]
        length = got.getheader("Content-Length") if self.command == "HEAD" else None
        self._send(got.status, headers, payload, length)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        del self.headers["Transfer-Encoding"]
        return body

    def _send(self, status: int, headers: list[tuple[str, str]], payload: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", length or str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)


def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts and short waits in this process."""
    monkeypatch.setattr("exfm.checkpoints.faults.BACK_OFF_S", 0.01)
    monkeypatch.setattr("exfm.checkpoints.remote.PART_BYTES", PART_BYTES)
    monkeypatch.setattr("exfm.checkpoints.remote.RANGE_BYTES", 1 << 20)


def noise(size_bytes: int) -> bytes:
    return np.random.default_rng(size_bytes).bytes(size_bytes)


def cut(payload: bytes, *sizes: int) -> Iterator[memoryview]:
    """The payload in parts of these sizes, then the rest."""
    view, start = memoryview(payload), 0
    for size in (*sizes, len(payload)):
        yield view[start : start + size]
        start += size
