"""An object store on this machine that speaks the part of S3's protocol that s3fs uses.

Buckets need not be made. Signatures are not checked.
"""

import hashlib
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from fake_store import FakeStore


class FakeS3(FakeStore):
    """A store with troubles.

    trouble: "slow": answers come after a second; "refuses": connections are closed;
      "fails": each answer is an error; "": none.
    """

    def __init__(self):
        self.trouble = ""
        super().__init__(_Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def parse_request(self):
        if not super().parse_request():
            return False
        address = urlsplit(self.path)
        self.name = unquote(address.path).strip("/")
        self.query = parse_qs(address.query, keep_blank_values=True)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.trouble == "refuses":
            self.close_connection = True
            return False
        if self.server.trouble == "fails":
            self.answer(503, b"<Error><Code>SlowDown</Code></Error>")
            return False
        if self.server.trouble == "slow":
            time.sleep(1)
        return True

    def do_GET(self):
        if "/" not in self.name:
            return self.answer(200, self.listing())
        self.do_HEAD(send_body=True)

    def do_HEAD(self, send_body=False):
        data = self.server.objects.get(self.name)
        if data is None:
            missing = b"<Error><Code>NoSuchKey</Code></Error>"
            return self.answer(404, missing, send_body=send_body)
        headers = {"ETag": etag(data), "Last-Modified": formatdate(0, usegmt=True)}
        if not (wanted := self.headers.get("Range")):
            return self.answer(200, data, headers, send_body)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last or len(data)) + 1]
        end = int(first) + len(part) - 1
        headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
        self.answer(206, part, headers, send_body)

    def do_PUT(self):
        if "/" in self.name:
            self.server.objects[self.name] = self.body
        self.answer(200, b"", {"ETag": etag(self.body)})

    def do_DELETE(self):
        self.server.objects.pop(self.name, None)
        self.answer(204, b"")

    def listing(self):
        """The answer to ListObjectsV2: keys, and the prefixes below a delimiter."""
        prefix = self.query.get("prefix", [""])[0]
        delimiter = self.query.get("delimiter", [""])[0]
        root, prefixes = ElementTree.Element("ListBucketResult"), set()
        for name, data in sorted(self.server.objects.items()):
            bucket, key = name.split("/", 1)
            if bucket != self.name or not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                continue
            fields = dict(Key=key, Size=len(data), ETag=etag(data))
            add(root, "Contents", fields | dict(LastModified="2026-01-01T00:00:00Z"))
        for common in sorted(prefixes):
            add(root, "CommonPrefixes", dict(Prefix=common))
        add(root, "IsTruncated", "false")
        return ElementTree.tostring(root)

    def answer(self, status, body, headers=None, send_body=True):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send_body:
            self.wfile.write(body)


def etag(data):
    return f'"{hashlib.md5(data).hexdigest()}"'


def add(parent, name, value):
    """Adds an element with a text, or with an element for each item of a dict."""
    child = ElementTree.SubElement(parent, name)
    if isinstance(value, dict):
        for key, text in value.items():
            add(child, key, text)
    else:
        child.text = str(value)
