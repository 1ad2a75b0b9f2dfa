"""An object store on this machine that speaks the part of the JSON API of Google Cloud
Storage that gcsfs uses. Credentials are not checked.
"""

import base64
import contextlib
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import gcsfs
from fake_store import FakeStore


class FakeGCS(FakeStore):
    """A store whose objects have generations."""

    def __init__(self):
        self.generations = {}
        super().__init__(_Handler)

    def write(self, name, data):
        self.objects[name] = data
        self.generations[name] = self.generations.get(name, 0) + 1
        return self.about(name)

    def about(self, name):
        bucket, key = name.split("/", 1)
        data, generation = self.objects[name], self.generations[name]
        return dict(
            kind="storage#object",
            id=f"{name}/{generation}",
            name=key,
            bucket=bucket,
            size=str(len(data)),
            generation=str(generation),
            md5Hash=base64.b64encode(hashlib.md5(data).digest()).decode(),
            updated="2026-01-01T00:00:00Z",
        )


@contextlib.contextmanager
def connected(monkeypatch):
    """Yields a FakeGCS that gcsfs finds."""
    # Otherwise gcsfs asks a service of another protocol what kind of bucket it is.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    with FakeGCS() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def parse_request(self):
        if not super().parse_request():
            return False
        address = urlsplit(self.path)
        words = [unquote(word) for word in address.path.strip("/").split("/")]
        self.query = {k: v[0] for k, v in parse_qs(address.query).items()}
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.chunks()
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket = words[words.index("b") + 1] if "b" in words else ""
        self.key = words[words.index("o") + 1 :] if "o" in words else None
        self.name = "/".join([bucket, *(self.key or [])])
        return True

    def chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self):
        if self.key == []:
            return self.answer(self.listing())
        if self.key is None:
            return self.answer(dict(kind="storage#bucket", name=self.name.strip("/")))
        if self.name not in self.server.objects:
            return self.answer(dict(error=dict(code=404, message="Not Found")), 404)
        if self.query.get("alt") == "media":
            return self.answer(self.server.objects[self.name])
        self.answer(self.server.about(self.name))

    def do_DELETE(self):
        found = self.server.objects.pop(self.name, None) is not None
        self.answer(b"", 204 if found else 404)

    def do_POST(self):
        """An upload in one request: two parts, of which the first says the name."""
        kind = self.query.get("uploadType")
        assert kind == "multipart", f"this store knows no upload of type {kind}"
        boundary = self.headers["Content-Type"].split("boundary=")[1].strip("\"'")
        parts = self.body.split(f"--{boundary}".encode())[1:3]
        about, data = (part.split(b"\n\n", 1)[1] for part in parts)
        name = json.loads(about)["name"]
        data = data[:-2] if data.endswith(b"\r\n") else data.removesuffix(b"\n")
        self.answer(self.server.write(f"{self.name}/{name}", data))

    def listing(self):
        prefix, delimiter = (self.query.get(k, "") for k in ("prefix", "delimiter"))
        items, prefixes = [], set()
        for name in sorted(self.server.objects):
            bucket, key = name.split("/", 1)
            if bucket != self.name or not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.server.about(name))
        return dict(kind="storage#objects", items=items, prefixes=sorted(prefixes))

    def answer(self, body, status=200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)
