"""Data sets of the hub, from a small hub of our own on this machine.

The library reads its address when it is imported, so each test reads in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0" * 40
CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train.jsonl}
  - {split: test, path: small/test.jsonl}
- config_name: labels
  data_files: labels/train.jsonl
---
"""


def rows(kind: str) -> bytes:
    return "".join(json.dumps({"text": f"{kind} {n}", "label": n}) + "\n" for n in range(3)).encode()


FILES = {
    "README.md": CARD.encode(),
    "small/train.jsonl": rows("train"),
    "small/test.jsonl": rows("test"),
    "labels/train.jsonl": b'{"label": 1}\n',
}


class Hub(BaseHTTPRequestHandler):
    """Serves the data set org/name: what it is, the list of its files, and their bytes."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/datasets/org/name/resolve/\w+/(.+)", path):
            self.file(match[1])
        elif match := re.fullmatch(r"/api/datasets/org/name/tree/\w+/(.+)", path):
            self.answer([entry(name) for name in FILES if name.startswith(f"{match[1]}/")])
        elif re.fullmatch(r"/api/datasets/org/name/revision/\w+", path):
            self.answer({"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        else:
            self.respond(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def file(self, name: str) -> None:
        if name not in FILES:
            self.respond(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content, status = FILES[name], 200
        headers = {"ETag": f'"{digest(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            start, stop = int(match[1]), min(int(match[2]) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self.respond(status, content, headers)

    def answer(self, value: object) -> None:
        self.respond(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def respond(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def digest(name: str) -> str:
    return hashlib.sha1(FILES[name]).hexdigest()


def entry(name: str) -> dict[str, object]:
    return {"type": "file", "oid": digest(name), "size": len(FILES[name]), "path": name}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("datasets")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


SCRIPT = """
import json, sys
from quantize.calib_data import documents
from quantize.errors import InputError

found = []
for source in sys.argv[1:]:
    try:
        found.append([document.text for document in documents(source)])
    except InputError as error:
        found.append([error.message, error.hint])
print(json.dumps(found))
"""


def run(folder: Path, script: str, arguments: list[str], **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=kept | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(folder / "home")} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(folder: Path, sources: list[str], **environment: str) -> list[list[str]]:
    """Returns, per source, its texts, or the message and hint of its error."""
    found: list[list[str]] = json.loads(run(folder, SCRIPT, sources, **environment))
    return found


def test_names_configurations_and_splits(address: str, tmp_path: Path) -> None:
    sources = ["hub:org/name@small:test", "hub:org/name@small", "hub:org/name@labels"]
    sources += ["hub:org/name@small:dev", "hub:org/name@large", "hub:org/other"]
    test, train, labels, split, config, other = read(tmp_path, sources, HF_ENDPOINT=address)
    assert test == ["test 0", "test 1", "test 2"]
    assert train == ["train 0", "train 1", "train 2"]
    assert labels[0] == "hub:org/name@labels: no text in its columns: label"
    for source, (message, hint) in zip(sources[3:], (split, config, other), strict=True):
        assert message.startswith(f"{source}: ")
        assert "\n" not in message
        assert "HF_TOKEN" in hint
    assert "train" in split[0]
    assert "small" in config[0]


def test_a_stream_may_be_left_half_read(address: str, tmp_path: Path) -> None:
    first = "from quantize.calib_data import documents; print(next(documents('hub:org/name@small')).text)"
    assert run(tmp_path, first, [], HF_ENDPOINT=address) == "train 0\n"


def test_without_a_network(tmp_path: Path) -> None:
    ((message, _),) = read(tmp_path, ["hub:org/name"], HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert message.startswith("hub:org/name: ")
    assert "\n" not in message
