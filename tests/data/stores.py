"""Object stores in this process that fail when told to: S3 by moto, and what gcsfs asks of Google's."""

from __future__ import annotations

import http.server
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "bucket"
CODES = {400: "ExpiredToken", 403: "AccessDenied", 429: "TooMany", 500: "InternalError", 503: "SlowDown"}

# What goes wrong at a read: an HTTP status; "cut" and "silence" after half of the body; "reset"; or something
# to do first, after which all is well.
Fault = int | str | Callable[[], object]


class Store:
    """Objects of one bucket. `faults` maps an object's last name to what goes wrong at its next reads,
    `reads` counts them."""

    scheme = ""

    def __init__(self) -> None:
        self.faults: dict[str, list[Fault]] = {}
        self.reads: Counter[str] = Counter()
        self.silence_s = 3.0

    def upload(self, folder: Path) -> str:
        """Put a folder's files into the bucket, and give its address."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{folder.name}/{path.relative_to(folder)}", path.read_bytes())
        return f"{self.scheme}://{BUCKET}/{folder.name}"

    def put(self, key: str, data: bytes) -> None:
        """Make or replace an object."""
        raise NotImplementedError

    def remove(self, key: str) -> None:
        """Make an object vanish."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop serving."""
        raise NotImplementedError

    def _next_fault(self, key: str) -> Fault | None:
        name = key.rpartition("/")[2]
        self.reads[name] += 1
        faults = self.faults.get(name)
        fault = faults.pop(0) if faults else None
        if callable(fault):
            fault()
            return None
        return fault

    def _spoiled(self, body: bytes, fault: Fault) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        if fault == "silence":
            time.sleep(self.silence_s)


def reset(connection: socket.socket) -> None:
    """Close a connection so that the other side sees it reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)  # the server closes it
    raise ConnectionResetError


class S3(Store):
    """moto's S3, found through the environment that every client of S3 knows."""

    scheme = "s3"

    def __init__(self) -> None:
        super().__init__()
        import boto3
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Handler(WSGIRequestHandler):
            def log(self, *args: object) -> None:
                """Say nothing."""

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        self._client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def remove(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=key)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Any:
        is_read = environ["REQUEST_METHOD"] == "GET"
        fault = self._next_fault(environ["PATH_INFO"]) if is_read else None
        if fault == "reset":
            reset(environ["werkzeug.socket"])
        if isinstance(fault, int):
            body = f"<Error><Code>{CODES[fault]}</Code><Message>said the store</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            start_response(f"{fault} {CODES[fault]}", headers)
            return [body]
        answer = self._app(environ, start_response)
        return answer if fault is None else self._spoiled(b"".join(answer), fault)


class Gcs(Store):
    """The part of Google's JSON API that gcsfs reads with: an object's metadata, its bytes, listings.

    https://cloud.google.com/storage/docs/json_api/v1/objects
    """

    scheme = "gs"

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                """Answer."""
                store.answer(self)

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients hang up
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.environment = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self._server.server_address[1]}"}

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def remove(self, key: str) -> None:
        del self.objects[key]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Answer a GET request."""
        url = urlsplit(request.path)
        query = dict(parse_qsl(url.query))
        place, _, key = url.path.partition("/o/")
        bucket, key = place.removesuffix("/o").rpartition("/")[2], unquote(key)
        if bucket != BUCKET:
            return self._send(request, 404, _error(404, "The specified bucket does not exist."))
        if not key:
            items = [self._metadata(key) for key in self.objects if key.startswith(query.get("prefix", ""))]
            return self._send(request, 200, {"kind": "storage#objects", "items": items})
        is_read = query.get("alt") == "media"
        fault = self._next_fault(key) if is_read else None
        if fault == "reset":
            reset(request.connection)
        if isinstance(fault, int):
            return self._send(request, fault, _error(fault, "said the store"))
        if key not in self.objects:
            return self._send(request, 404, _error(404, f"No such object: {BUCKET}/{key}"))
        if not is_read:
            return self._send(request, 200, self._metadata(key))
        data, status = self.objects[key], 200
        if wanted := request.headers.get("Range"):
            start, _, last = wanted.removeprefix("bytes=").partition("-")
            if int(start) >= len(data):
                return self._send(request, 416, _error(416, "Requested range not satisfiable"))
            data, status = data[int(start) : int(last) + 1], 206
        return self._send(request, status, data, fault)

    def _metadata(self, key: str) -> dict[str, str]:
        size = str(len(self.objects[key]))
        return {"kind": "storage#object", "name": key, "bucket": BUCKET, "size": size}

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        content: bytes | dict[str, Any],
        fault: Fault | None = None,
    ) -> None:
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if fault is None:
            request.wfile.write(data)
            return
        for part in self._spoiled(data, fault):
            request.wfile.write(part)
            request.wfile.flush()
        request.close_connection = True


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"code": status, "message": message}}
