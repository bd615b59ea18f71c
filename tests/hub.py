"""A Hub on this machine: enough of its API to make a repository, commit to it and read from it; it can break off."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest


@dataclass
class Hub:
    """Repositories as lists of commits, each a name -> content; `main` is the last, and tags may point elsewhere."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # repo -> oid -> files, in order
    tags: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)  # of models that are bases
    sent: list[str] = field(default_factory=list)  # sha256 of what was uploaded
    breaks: int | None = None  # bytes after which an upload or a download is cut off
    forges: bool = False  # large files are served with one byte changed
    url: str = ""

    def oid(self, repo: str, revision: str) -> str | None:
        made = self.commits.get(repo, {})
        if revision == "main":
            return next(reversed(made), None)
        return self.tags.get(revision, revision if revision in made else None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def do_POST(self) -> None:
        hub, parts = self.hub, unquote(self.path.partition("?")[0]).strip("/").split("/")
        content = self.body()
        if parts[:3] == ["api", "repos", "create"]:
            made = json.loads(content)
            repo = f"{made['organization']}/{made['name']}" if made.get("organization") else made["name"]
            hub.commits.setdefault(repo, {})
            return self.answer({"url": f"{hub.url}/{repo}"})
        if parts[-1] == "validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "preupload" in parts:
            kinds = {".safetensors": "lfs", ".png": "lfs"}
            files = [
                {"path": f["path"], "uploadMode": kinds.get("." + f["path"].rpartition(".")[2], "regular")}
                for f in json.loads(content)["files"]
            ]
            return self.answer({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        if parts[-1] == "batch":
            objects = json.loads(content)["objects"]
            actions = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/put/{each['oid']}", "header": {}}}}
                if each["oid"] not in hub.blobs
                else each
                for each in objects
            ]
            return self.answer({"transfer": "basic", "objects": actions})
        if "commit" in parts:
            return self._commit("/".join(parts[2:4]), content)
        if "paths-info" in parts:
            files = hub.commits["/".join(parts[2:4])][parts[-1]]
            asked = content.decode()
            names = (
                json.loads(asked)["paths"]
                if asked.startswith("{")
                else [
                    unquote(each.partition("=")[2].replace("+", " "))
                    for each in asked.split("&")
                    if each.startswith("paths")
                ]
            )
            return self.answer([self._entry(name, files[name]) for name in names if name in files])
        return self.answer({"error": "no such place"}, 404)

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        sha = hashlib.sha256(content).hexdigest()
        large = (
            {"lfs": {"oid": sha, "size": len(content), "pointerSize": 1}} if content in self.hub.blobs.values() else {}
        )
        return {"type": "file", "path": name, "size": len(content), "oid": sha[:40], **large}

    def _commit(self, repo: str, content: bytes) -> None:
        hub = self.hub
        files = dict(hub.commits[repo].get(hub.oid(repo, "main") or "", {}))
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
        oid = hashlib.sha1(content + str(len(hub.commits[repo])).encode()).hexdigest()
        hub.commits[repo][oid] = files
        self.answer(
            {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo}/commit/{oid}", "hookOutput": ""}
        )

    def do_PUT(self) -> None:
        hub = self.hub
        if hub.breaks is not None:
            self.rfile.read(min(hub.breaks, int(self.headers["Content-Length"])))
            return self.cut()
        content = self.body()
        sha = hashlib.sha256(content).hexdigest()
        hub.blobs[sha] = content
        hub.sent.append(sha)
        return self.answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, parts = self.hub, unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo in hub.cards:
                return self.answer(
                    {"id": repo, "modelId": repo, "cardData": hub.cards[repo], "siblings": [], "tags": []}
                )
            oid = hub.oid(repo, parts[5] if len(parts) > 5 else "main")
            if oid is None:
                return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
            files = hub.commits[repo][oid]
            if "tree" in parts:
                return self.answer([self._entry(name, content) for name, content in files.items()])
            return self.answer(
                {"id": repo, "sha": oid, "siblings": [{"rfilename": name} for name in files], "tags": []}
            )
        repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        oid = hub.oid(repo, revision)
        if oid is None or name not in hub.commits[repo][oid]:
            return self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
        return self._file(oid, name, hub.commits[repo][oid][name])

    def _file(self, oid: str, name: str, content: bytes) -> None:
        etag = hashlib.sha256(content).hexdigest()
        if self.hub.forges and name.endswith(".safetensors"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", oid)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.hub.breaks is not None and name.endswith(".safetensors"):
            self.wfile.write(content[: self.hub.breaks])
            return self.cut()
        self.wfile.write(content)
        return None


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """A Hub that huggingface_hub takes for its own inside the block, with a cache of its own."""
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    changed = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(cache)}
    changed["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    hasty = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # it waits longer with each trial
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", hasty)
    monkeypatch.setenv("HF_TOKEN", "loopback")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
