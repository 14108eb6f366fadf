"""Where a model comes from: a path, the current folder, or the hub (a small one of our own on this machine)."""

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
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import tiny
import torch

from quantize.checkpoint import describe, fingerprint, is_quantized, locate, open_checkpoint
from quantize.errors import InputError, UsageError
from quantize.formats.awq import AWQFormat
from quantize.schemes import AffineInt

COMMITS = {"main": "1" * 40, "v2": "2" * 40}


class Hub(BaseHTTPRequestHandler):
    """Serves the model org/name from a folder per revision; org/gated asks for terms, anything else is unknown."""

    root: Path
    asked: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if re.match(r"/(api/models/)?org/gated/", path):
            self.respond(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
        elif match := re.fullmatch(r"/org/name/resolve/(\w+)/(.+)", path):
            self.file(match[1], match[2])
        elif match := re.match(r"/api/models/org/name/(?:revision|tree)/(\w+)", path):
            self.listing(match[1], tree="/tree/" in path)
        else:
            self.respond(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def folder(self, revision: str) -> tuple[Path, str] | None:
        for name, commit in COMMITS.items():
            if revision in (name, commit):
                return self.root / name, commit
        self.respond(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return None

    def listing(self, revision: str, tree: bool) -> None:
        if found := self.folder(revision):
            names = list(tiny.contents(found[0]))
            siblings = [{"rfilename": name} for name in names]
            entries = [{"type": "file", "oid": "0" * 40, "size": 1, "path": name} for name in names]
            value: object = entries if tree else {"id": "org/name", "sha": found[1], "siblings": siblings}
            self.respond(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def file(self, revision: str, name: str) -> None:
        if found := self.folder(revision):
            content = (found[0] / name).read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            self.respond(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": found[1]})

    def respond(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


# Opens each model named in turn, in one process whose hub settings are those of its environment.
SCRIPT = """
import json, sys
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError

found = []
for name in sys.argv[1:]:
    try:
        checkpoint = open_checkpoint(name)
    except InputError as error:
        found.append({"message": error.message, "hint": error.hint})
    else:
        first = float(checkpoint.read("model.norm.weight")[0])
        found.append({"path": str(checkpoint.path), "first": first, "files": sorted(checkpoint.side_files)})
print(json.dumps(found))
"""


def opened(folder: Path, *names: str, **environment: str) -> list[dict[str, Any]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    search = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env=kept | {"PYTHONPATH": search, "HF_HOME": str(folder / "home")} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    Hub.root, Hub.asked = tmp_path / "hub", []
    for seed, name in enumerate(COMMITS):
        folder = tiny.llama(Hub.root / name, seed=seed, shards=2)
        for extra in ("README.md", "LICENSE", "1_Pooling/config.json", "pytorch_model.bin", "original/params.json"):
            (folder / extra).parent.mkdir(exist_ok=True)
            (folder / extra).write_text(name)
        (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Hub.asked
        server.shutdown()
        thread.join()


def test_models_of_the_hub(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    work = tmp_path / "work"
    (work / "org" / "name").mkdir(parents=True)  # a folder that is called like the model and is none
    names = ["hub:org/name", "hub:org/name@v2", "org/name", "hub:org/name@v3", "org/none", "org/gated", "bad--name/x"]
    main, second, local, revision, none, gated, bad = opened(work, *names, HF_ENDPOINT=address)

    first = [float(open_checkpoint(Hub.root / name).read("model.norm.weight")[0]) for name in COMMITS]
    assert [main["first"], second["first"]] == first
    assert main["path"] == str(work / "home" / "hub" / "models--org--name" / "snapshots" / COMMITS["main"])
    assert main["files"] == ["1_Pooling/config.json", "LICENSE", "README.md"]
    downloaded = {path.rpartition("/")[2] for path in asked if "/resolve/" in path}
    assert not downloaded & {"pytorch_model.bin", "consolidated.safetensors", "params.json"}

    assert local["message"].startswith("org/name: no model that can be read")
    for name, said in (("hub:org/name@v3", revision), ("org/none", none), ("bad--name/x", bad)):
        assert said["message"] == f"{name.removeprefix('hub:')}: neither a local path nor a model on the hub"
        assert "HF_TOKEN" in said["hint"]
    assert gated["message"] == "org/gated: gated on the hub"
    assert "accept its terms" in gated["hint"]
    assert "HF_TOKEN" in gated["hint"]

    # without a network, by switch and by fact, what is there is found and the rest is refused in one line
    del asked[:]
    for environment in ({"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": address}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again, missing = opened(work, "hub:org/name", "org/none", **environment)
        assert again == main
        assert missing["message"].startswith("org/none: no such path, and not in the hub cache")
        assert "\n" not in missing["message"]
    assert asked == []


# ------------------------------------------------------------------------------------------------------------
# Paths


@pytest.mark.parametrize(
    "name", ["/no/such/model", "./none", "../none", "~/no such model", "~nobody_of_that_name/x", "a/b/c", "/", "none/"]
)
def test_paths_that_do_not_exist_are_never_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quantize.checkpoint._download", lambda name: pytest.fail(f"{name} was asked of the hub"))
    if name == "/":
        assert locate(name) == Path("/")
        return
    if name == "none/":
        (tmp_path / "none").mkdir()
        assert locate(name) == Path("none")
        return
    with pytest.raises(InputError, match="no such file or folder") as caught:
        locate(name)
    assert caught.value.message.startswith(name)


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="the current folder holds none") as caught:
        locate(None)
    assert "quantize run MODEL" in caught.value.hint
    tiny.llama(tmp_path)
    assert locate(None) == tmp_path
    assert len(open_checkpoint(None).tensors) == 21


def test_a_path_with_spaces_and_umlauts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.llama(tmp_path / "my model" / "über@v2")
    assert len(open_checkpoint("my model/über@v2").tensors) == 21


# ------------------------------------------------------------------------------------------------------------
# What is said of a checkpoint


def test_fingerprints_tell_models_apart(tmp_path: Path) -> None:
    one = fingerprint(open_checkpoint(tiny.llama(tmp_path / "one")))
    assert fingerprint(open_checkpoint(tiny.llama(tmp_path / "two", shards=2))) == one
    others = [
        tiny.llama(tmp_path / "seed", seed=1),
        tiny.llama(tmp_path / "config", rope_theta=5.0),
        tiny.llama(tmp_path / "type", dtype=torch.float16),
        tiny.llama(tmp_path / "more", extra={"mtp.scalar": torch.tensor(1.0)}),
        tiny.llama(tmp_path / "none", extra={"mtp.empty": torch.zeros(0, 3)}),
    ]
    found = [fingerprint(open_checkpoint(path)) for path in others]
    assert len({one, *found}) == 6


def test_description(tmp_path: Path) -> None:
    scheme = AffineInt(4, 32)
    arrays = AWQFormat().pack("a.weight", scheme.encode(torch.ones(8, 64)))
    block = AWQFormat().quantization_config({"a.weight": scheme})
    tensors = {**arrays, "b.weight": torch.ones(3, dtype=torch.bfloat16), "x.inv_freq": torch.ones(2)}
    path = tiny.write(tmp_path / "m", {"model_type": "llama", "quantization_config": block}, tensors)
    (path / "tokenizer.json").touch()
    checkpoint = open_checkpoint(path)
    assert is_quantized(checkpoint)
    value = describe(checkpoint)
    assert json.loads(json.dumps(value)) == value
    assert value["format"] == "awq"
    assert value["quantization"] == block
    assert value["tensors"] == 2
    assert value["weights"] == 8 * 64 + 3
    assert value["bytes"] == 8 * 64 // 2 + 2 * (4 + 16) + 6
    assert value["schemes"]["int4-g32"] == {"tensors": 1, "weights": 512, "bytes": 296, "bits_per_weight": 4.625}
    assert value["dropped"] == {"x.inv_freq": "a buffer that engines compute"}
    assert value["side_files"] == ["tokenizer.json"]
