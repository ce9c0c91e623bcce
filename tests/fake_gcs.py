"""Cloud Storage's JSON API on this machine, for the programs that speak it: gcsfs and TensorStore, as they come.

One bucket in memory; objects are whole or absent, each has a generation, writes and deletions may ask for one
(cloud.google.com/storage/docs/json_api/v1). Nothing is checked of who asks.
"""

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "bucket"


@dataclass
class Bucket:
    """What lies in it: name -> (generation, bytes).

    Attributes:
      refuse: methods that are answered 403, as to someone without a role.
      unanswered: so many of the next writes are made, but answered 503.
    """

    url: str = ""
    objects: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    refuse: set[str] = field(default_factory=set)
    unanswered: int = 0
    written: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    generations: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def environment(self) -> dict[str, str]:
        """For processes whose gs:// is to be this bucket's server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        }


class _Missing(Exception):
    pass


class _Differs(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, format, *args):
        pass

    def _serve(self):
        url, body = urlsplit(self.path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = dict(parse_qsl(url.query))
        try:
            if self.command in self.bucket.refuse:
                return self._send(403, {"error": {"code": 403, "message": "Forbidden: no such role"}})
            if url.path == f"/upload/storage/v1/b/{BUCKET}/o":
                return self._upload(query, body)
            parts = url.path.removeprefix("/download").removeprefix("/storage/v1/b/").split("/")
            if parts[0] != BUCKET:
                raise _Missing
            if len(parts) == 1:
                return self._send(200, {"kind": "storage#bucket", "name": BUCKET})
            if len(parts) == 2:
                return self._list(query)
            return self._object(unquote(parts[2]), [unquote(each) for each in parts[3:]], query)
        except _Missing:
            self._send(404, {"error": {"code": 404, "message": "No such object"}})
        except _Differs:
            self._send(412, {"error": {"code": 412, "message": "conditionNotMet"}})

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, status, content, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def _about(self, name):
        generation, content = self.bucket.objects[name]
        about = {"kind": "storage#object", "bucket": BUCKET, "name": name, "size": str(len(content))}
        return about | {"generation": str(generation), "metageneration": "1", "updated": "2026-01-01T00:00:00.000Z"}

    def _check(self, name, query):
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != self.bucket.objects.get(name, (0,))[0]:
            raise _Differs

    def _put(self, name, content, query):
        with self.bucket.lock:
            self._check(name, query)
            self.bucket.objects[name] = next(self.bucket.generations), content
            self.bucket.written.append(name)
            if self.bucket.unanswered:
                self.bucket.unanswered -= 1
                return self._send(503, {"error": {"code": 503, "message": "Service Unavailable"}})
            return self._send(200, self._about(name))

    def _upload(self, query, body):
        if query["uploadType"] == "multipart":
            mark = b"--" + self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
            about, content = (part.partition(b"\n\n")[2] for part in body.split(mark)[1:3])
            return self._put(json.loads(about)["name"], content[:-1], query)
        if query["uploadType"] == "resumable" and "upload_id" not in query:
            return self._send(200, {}, {"Location": f"{self.bucket.url}{self.path}&upload_id=1"})
        return self._put(query["name"], body, query)  # in one part, as small ones come

    def _list(self, query):
        prefix, delimiter, found, folders = query.get("prefix", ""), query.get("delimiter"), [], set()
        with self.bucket.lock:
            for name in sorted(self.bucket.objects):
                in_range = query.get("startOffset", "") <= name < query.get("endOffset", "~")
                if not (in_range and name.startswith(prefix)):
                    continue
                head, mark, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                if mark:
                    folders.add(prefix + head + mark)
                else:
                    found.append(self._about(name))
        self._send(200, {"kind": "storage#objects", "items": found, "prefixes": sorted(folders)})

    def _object(self, name, action, query):
        objects = self.bucket.objects
        if action and self.command == "POST":  # rewriteTo/b/BUCKET/o/NAME, moveTo/o/NAME
            with self.bucket.lock:
                if name not in objects:
                    raise _Missing
                objects[action[-1]] = next(self.bucket.generations), objects[name][1]
                if action[0] == "moveTo":
                    del objects[name]
                    return self._send(200, self._about(action[-1]))
            return self._send(200, {"done": True, "resource": self._about(action[-1])})
        with self.bucket.lock:
            if name not in objects:
                raise _Missing
            if self.command == "DELETE":
                self._check(name, query)
                del objects[name]
                return self._send(204, b"")
            generation, content = objects[name]
            about = self._about(name)
        if query.get("alt") != "media":
            return self._send(200, about)
        headers = {"x-goog-generation": generation, "Content-Type": "application/octet-stream"}
        if "Range" not in self.headers:
            return self._send(200, content, headers)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        begin = int(first) if first else len(content) - int(last)
        end = min(int(last), len(content) - 1) if first and last else len(content) - 1
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        return self._send(206, content[begin : end + 1], headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Nothing: gcsfs gives requests up whose answer it no longer needs."""


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """A server with an empty bucket, in this context."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    with _Server(("localhost", 0), handler) as server:
        bucket.url = f"http://localhost:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="bucket", daemon=True)
        thread.start()
        try:
            yield bucket
        finally:
            server.shutdown()
            thread.join()
