"""As much of the hub's API as `hf upload` calls, on this machine: what it is sent is kept."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

__all__ = ["FakeHub", "fake_hub"]


@dataclass
class FakeHub:
    """What was uploaded.

    Attributes:
        address: For `HF_ENDPOINT`.
        files: Bytes of each file by repository and path.
        cards: The cards that were asked to be checked, by kind of repository.
    """

    address: str
    files: dict[tuple[str, str], bytes] = field(default_factory=dict[tuple[str, str], bytes])
    cards: dict[str, str] = field(default_factory=dict[str, str])


class Handler(BaseHTTPRequestHandler):
    """`HfApi.upload_folder`: create, check the card, ask for the way of each file, commit."""

    hub: ClassVar[FakeHub]
    stored: ClassVar[dict[str, bytes]]

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.reply(self.found(self.path.partition("?")[0], sent))

    def do_PUT(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        self.stored[self.path.rpartition("/")[2]] = sent
        self.reply({})

    def do_GET(self) -> None:
        self.reply({"siblings": [], "sha": "0" * 40, "harnesses": []})

    def found(self, path: str, sent: bytes) -> Any:
        if path.endswith("/commit/main"):
            return self.commit("/".join(path.split("/")[2:5]), sent)
        value = json.loads(sent or b"{}")
        if path == "/api/repos/create":
            repo = f"{value['organization']}/{value['name']}"
            return {"url": f"{self.hub.address}/{repo}", "id": repo, "name": repo}
        if path == "/api/validate-yaml":
            self.hub.cards[value["repoType"]] = value["content"]
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = [
                {
                    "path": one["path"], "shouldIgnore": False,
                    "uploadMode": "regular" if one["path"].endswith(".md") else "lfs",
                }
                for one in value["files"]
            ]  # fmt: skip
            return {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [self.place(o) for o in value["objects"]]}
        return {}

    def place(self, one: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.hub.address}/put/{one['oid']}"
        return {**one, "actions": {"upload": {"href": href, "header": {}}}}

    def commit(self, repo: str, sent: bytes) -> dict[str, Any]:
        for line in sent.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.files[repo, value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = self.stored[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                self.hub.files[repo, value["path"]] = data
        url = f"{self.hub.address}/{repo.removeprefix('models/')}/commit/{'0' * 40}"
        return {"commitUrl": url, "commitOid": "0" * 40}

    def reply(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def fake_hub() -> Generator[FakeHub]:
    """Serve until the block ends."""

    class Mine(Handler):
        """This hub's."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    hub = Mine.hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    Mine.stored = {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
