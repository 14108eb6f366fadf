"""Editing and comparing GGUF files: what must stay stays, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantize.errors import InputError, ResourceError, UsageError, VerificationError
from quantize.formats.container import tensor_bytes, write_all
from quantize.formats.gguf import edit as editing
from quantize.formats.gguf import stream
from quantize.formats.gguf.compare import compare
from quantize.formats.gguf.container import read_part, read_parts
from quantize.formats.gguf.edit import edit
from quantize.formats.gguf.header import journal_path, read_values
from quantize.formats.gguf.layout import Entry, layout
from quantize.formats.gguf.metadata import Kind, Value, f32, flag, integers, parse_value, text, texts, u32
from quantize.formats.gguf.split import part_names, split_metadata
from quantize.kernels.cpu.ggml import BLOCKS
from quantize.schemes import DTYPES, GGMLBlock, Plain

METADATA = {
    "general.architecture": text("llama"),
    "general.name": text("Tiny"),
    "llama.block_count": u32(2),
    "eps": f32(1e-5),
    "big": Value(Kind.U64, 2**40),
    "tokenizer.ggml.tokens": texts(f"token{i}" for i in range(300)),
    "tokenizer.ggml.scores": Value(Kind.F32, [-0.1 * i for i in range(300)], True),
    "tokenizer.ggml.add_bos_token": flag(True),
    "empty": text(""),
    "none": integers([]),
}
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "token_embd.weight": ("q8_0", (300, 64)),
    "conv": ("f32", (1, 5)),
    "blk.0.w": ("q4_k", (6, 256)),
    "blk.1.w": ("bf16", (3, 7)),
    "norm": ("f32", (64,)),
}
SPLIT = ("split.no", "split.count", "split.tensors.count")


def contents(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits: nothing here looks inside."""
    count = torch.Size(shape).numel() // BLOCKS[kind].weights * BLOCKS[kind].nbytes
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if BLOCKS[kind].weights == 1:
        return raw.view(DTYPES[kind]).reshape(shape)
    return raw.reshape(*shape[:-1], -1)


TENSORS = {name: contents(*made, seed) for seed, (name, made) in enumerate(SHAPES.items())}


def write(path: Path, metadata: Mapping[str, Value] = METADATA, names: Sequence[str] = tuple(SHAPES)) -> Path:
    entries = []
    for name in names:
        kind, shape = SHAPES[name]
        scheme = Plain(DTYPES[kind]) if BLOCKS[kind].weights == 1 else GGMLBlock(kind)
        entries.append(Entry(name, shape, scheme))
    place = layout(metadata, entries, all_dims=True)
    raw = bytearray(place.header.ljust(place.size, b"\0"))
    for name, (offset, nbytes) in place.where.items():
        raw[offset : offset + nbytes] = bytes(tensor_bytes(TENSORS[name]))
    path.write_bytes(raw)
    return path


def write_parts(folder: Path, count: int) -> list[Path]:
    """The same model cut into parts."""
    names, size = list(SHAPES), -(-len(SHAPES) // count)
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    keys = split_metadata(METADATA, [len(group) for group in groups])
    files = [folder / name for name in part_names("parts", count)]
    return [write(*made) for made in zip(files, keys, groups, strict=True)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf")


def encoded(values: Mapping[str, Value]) -> dict[str, bytes]:
    return {key: value.encode() for key, value in values.items()}


def assert_holds(path: Path, metadata: Mapping[str, Value], *, dropped: tuple[str, ...] = ()) -> None:
    """The model at `path` has exactly this metadata, in this order, and all tensors bit for bit."""
    parts = read_parts(path)
    found = {key: value for key, value in encoded(read_values(parts[0].file)).items() if key not in dropped}
    assert list(found.items()) == list(encoded(metadata).items())
    tensors = {name: stored for part in parts for name, stored in part.tensors.items()}
    assert list(tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].shape == SHAPES[name][1]
        assert bytes(tensor_bytes(tensors[name].read())) == bytes(tensor_bytes(tensor)), name
    for part in parts:
        alignment = part.metadata.get("general.alignment", 32)
        reader = gguf.GGUFReader(part.file)
        end = reader.data_offset
        for tensor in reader.tensors:
            assert tensor.data_offset == end
            end += -(-int(tensor.n_bytes) // alignment) * alignment
        assert end == part.file.stat().st_size


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- values as text


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("u32:5", u32(5)),
        ("u8:255", Value(Kind.U8, 255)),
        ("i64:-5", Value(Kind.I64, -5)),
        ("u16:0x10", Value(Kind.U16, 16)),
        ("f64:1e300", Value(Kind.F64, 1e300)),
        ("f32:-inf", Value(Kind.F32, float("-inf"))),
        ("bool:false", flag(False)),
        ("bool: True", flag(True)),
        ("text:u32:5", text("u32:5")),
        ("text:", text("")),
        ("string:a\nb", text("a\nb")),
        ("[i32]:[1, -2]", integers([1, -2])),
        ("[text]:[]", texts([])),
        ('[str]:["a", ""]', texts(["a", ""])),
        ("[f32]:[1, 2.5]", Value(Kind.F32, [1, 2.5], True)),
        ("[bool]:[true, false]", Value(Kind.BOOL, [True, False], True)),
        ("true", flag(True)),
        ("False", flag(False)),
        ("7", u32(7)),
        ("-7", Value(Kind.I32, -7)),
        ("5000000000", Value(Kind.U64, 5 * 10**9)),
        ("-5000000000", Value(Kind.I64, -5 * 10**9)),
        ("0.5", f32(0.5)),
        ("1e-5", f32(1e-5)),
        ("[1, 2]", integers([1, 2])),
        ("[1, 5000000000]", Value(Kind.I64, [1, 5 * 10**9], True)),
        ("[1, 2.5]", Value(Kind.F32, [1, 2.5], True)),
        ('["a"]', texts(["a"])),
        ("[true]", Value(Kind.BOOL, [True], True)),
        ("some: text", text("some: text")),
        ("[INST] {{ x }}", text("[INST] {{ x }}")),
        ("1.2.3", text("1.2.3")),
        ("", text("")),
        ("nan", text("nan")),
    ],
)
def test_values_of_new_keys(said: str, value: Value) -> None:
    assert parse_value(said) == value
    assert parse_value(said).encode() == value.encode()


@pytest.mark.parametrize(
    ("said", "existing", "value"),
    [
        ("7", f32(1), f32(7)),
        ("7", text("a"), text("7")),
        ("true", text("a"), text("true")),
        ("false", flag(True), flag(False)),
        ("7", Value(Kind.I8, 1), Value(Kind.I8, 7)),
        ("[1]", text("a"), text("[1]")),
        ("[1]", Value(Kind.U64, [2], True), Value(Kind.U64, [1], True)),
        ("[]", texts(["a"]), texts([])),
        ("u8:7", text("a"), Value(Kind.U8, 7)),
        ("text:7", u32(1), text("7")),
    ],
)
def test_existing_keys_keep_their_type(said: str, existing: Value, value: Value) -> None:
    assert parse_value(said, existing) == value


@pytest.mark.parametrize(
    ("said", "existing", "message"),
    [
        ("u8:256", None, "'256' is no u8"),
        ("u32:-1", None, "'-1' is no u32"),
        ("u32:1.5", None, "'1.5' is no u32"),
        ("bool:yes", None, r"'yes' is no bool \(say true or false\)"),
        ("YES", flag(True), "'YES' is no bool"),
        ("f32:1e40", None, "'1e40' is no f32"),
        ("f32:x", None, "'x' is no f32"),
        ("[i32]:1", None, "'1' is no JSON list"),
        ("[i32]:[1", None, "is no JSON list"),
        ('[i32]:["1"]', None, r"is no \[i32\]"),
        ("[u8]:[1, 300]", None, r"is no \[u8\]"),
        ("[i32]:[true]", None, r"is no \[i32\]"),
        ("[[1]]", None, "elements of which type"),
        ("[]", None, "elements of which type"),
        ("[null]", None, "elements of which type"),
        ("100000000000000000000", None, "does not fit 64 bits"),
        ("two", u32(1), "'two' is no u32"),
    ],
)
def test_texts_that_are_no_such_value(said: str, existing: Value | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_value(said, existing)


@given(st.text(max_size=30))
def test_any_text_is_a_value_or_a_usage_error(said: str) -> None:
    try:
        parse_value(said).encode()
    except UsageError:
        pass
    except ValueError:
        assert not said.isprintable()  # a lone surrogate
    assert parse_value(f"text:{said}") == text(said)


# --- editing


def test_a_scalar_changes_in_place(model: Path) -> None:
    before, node = model.read_bytes(), model.stat().st_ino
    done = edit(model, {"eps": f32(1e-6), "tokenizer.ggml.add_bos_token": flag(False)})
    assert done.changed == ("eps", "tokenizer.ggml.add_bos_token")
    assert done.in_place
    assert model.stat().st_ino == node
    assert_holds(model, METADATA | {"eps": f32(1e-6), "tokenizer.ggml.add_bos_token": flag(False)})
    after = model.read_bytes()
    assert len(after) == len(before)
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 5


@pytest.mark.parametrize("grow", [-17, -16, -15, -1, 0, 16, 17])
def test_what_still_fits_before_the_data_is_written_in_place(tmp_path: Path, grow: int) -> None:
    """The header has 16 bytes to spare; with 32 the data could start earlier. All that lies behind the name moves."""
    unpadded = METADATA | {"general.name": text("x" * 24), "general.alignment": u32(1), "pad": text("")}
    entries = [
        Entry(name, stored.shape, stored.scheme) for name, stored in read_part(write(tmp_path / "x")).tensors.items()
    ]
    length = len(layout(unpadded, entries, all_dims=True).header)
    metadata = unpadded | {"general.alignment": u32(32), "pad": text("y" * ((16 - length) % 32))}
    path = write(tmp_path / "m.gguf", metadata)
    before = read_part(path).start
    name = text("N" * (24 + grow))
    node = path.stat().st_ino
    done = edit(path, {"general.name": name})
    assert done.in_place is (-15 <= grow <= 16)
    assert (path.stat().st_ino == node) is done.in_place
    assert (read_part(path).start == before) is done.in_place
    assert not list(tmp_path.glob(".*"))
    assert_holds(path, metadata | {"general.name": name})


@pytest.mark.parametrize(
    ("put", "remove"),
    [
        ({"general.name": text("x" * 1000)}, ()),
        ({"tokenizer.chat_template": text("{{ ä }}\n" * 50), "list": integers(range(9))}, ()),
        ({}, ("tokenizer.ggml.tokens",)),
        ({"tokenizer.ggml.tokens": texts(["a", "b"])}, ("eps", "none", "empty")),
        ({"eps": text("now a text of some length, more than fits")}, ()),
        ({"general.alignment": u32(256)}, ()),
        ({"general.alignment": u32(8), "general.name": text("")}, ()),
    ],
)
def test_other_edits_copy_the_file(model: Path, put: dict[str, Value], remove: tuple[str, ...]) -> None:
    model.chmod(0o640)
    node = model.stat().st_ino
    plan = edit(model, put, remove, dry_run=True)
    assert model.stat().st_ino == node
    done = edit(model, put, remove)
    assert done == plan
    assert not done.in_place
    assert done.written == model.stat().st_size
    assert model.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in model.parent.iterdir()] == [model.name]
    assert_holds(model, {key: value for key, value in (METADATA | put).items() if key not in remove})


def test_an_edit_that_changes_nothing_writes_nothing(model: Path) -> None:
    os.utime(model, ns=(1, 1))
    done = edit(model, {"eps": f32(1e-5), "none": integers([])})
    assert (done.changed, done.written) == ((), 0)
    assert model.stat().st_mtime_ns == 1


def test_all_values_can_go_and_come(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {})
    edit(path, METADATA)
    assert_holds(path, METADATA)
    edit(path, {}, list(METADATA))
    assert path.read_bytes() == write(tmp_path / "n.gguf", {}).read_bytes()


def test_a_file_of_metadata_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    metadata = METADATA | {"last": text("x")}
    path.write_bytes(layout(metadata, []).header.rstrip(b"\0"))  # not padded to the end
    edit(path, {"llama.block_count": u32(3)})
    assert encoded(read_values(path)) == encoded(metadata | {"llama.block_count": u32(3)})


def test_dry_run_leaves_the_folder_as_it_is(model: Path) -> None:
    os.utime(model, ns=(1, 1))
    before = listing(model.parent)
    assert edit(model, {"eps": f32(2)}, dry_run=True).in_place
    assert not edit(model, {"general.name": text("n" * 99)}, dry_run=True).in_place
    assert listing(model.parent) == before
    assert model.stat().st_mtime_ns == 1


@pytest.mark.parametrize("link", ["symlink", "hardlink"])
def test_other_names_of_a_file_keep_what_they_had(model: Path, link: str) -> None:
    """Such as the blob in a download cache, whose name is its hash."""
    blob, before = model.with_name("blob"), model.read_bytes()
    model.rename(blob)
    model.symlink_to(blob) if link == "symlink" else model.hardlink_to(blob)
    done = edit(model, {"eps": f32(2)})
    assert not done.in_place
    assert blob.read_bytes() == before
    assert not model.is_symlink()
    assert_holds(model, METADATA | {"eps": f32(2)})


@pytest.mark.parametrize(
    ("put", "remove", "error", "message"),
    [
        ({}, ["epz"], UsageError, r"unknown metadata key 'epz' \(did you mean 'eps'\?\)"),
        ({"eps": f32(1)}, ["eps"], UsageError, "'eps' cannot be set and removed at once"),
        ({"eps": Value(Kind.U8, 256)}, [], InputError, "metadata key 'eps': u8 cannot hold"),
        ({"": u32(1)}, [], InputError, "the key ''"),
        ({"general.alignment": u32(3)}, [], InputError, "not a u32 that is a power of two"),
    ],
)
def test_edits_that_are_refused(
    model: Path, put: dict[str, Value], remove: list[str], error: type[Exception], message: str
) -> None:
    before = listing(model.parent)
    for dry_run in (True, False):
        with pytest.raises(error, match=message):
            edit(model, put, remove, dry_run=dry_run)
    assert listing(model.parent) == before


def test_files_that_cannot_be_edited(tmp_path: Path, model: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.gguf: No such file"):
        edit(tmp_path / "absent.gguf", {"a": u32(1)})
    first, second = write_parts(tmp_path, 2)
    with pytest.raises(UsageError, match="a later part of a split model holds no metadata"):
        edit(second, {"eps": f32(1)})
    assert edit(first, {"eps": f32(1)}).in_place
    assert_holds(second, METADATA | {"eps": f32(1)}, dropped=SPLIT)
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="a big-endian GGUF file"):
        edit(tmp_path / "big.gguf", {"eps": f32(1)})
    with editing._locked(model), pytest.raises(UsageError, match="another edit is at work"):
        edit(model, {"eps": f32(1)})


def moved(path: Path) -> dict[str, Value]:
    """An edit that fits and moves most of the header: the name gives a byte that the last text takes."""
    return {"general.name": text("Tin"), "empty": text("x")}


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("after", [0, 1, 700, 3000, 10**9])
def test_killed_in_the_middle_of_the_header(model: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    put = moved(model)

    def torn(descriptor: int, data: bytes, offset: int) -> None:
        write_all(descriptor, data[:after], offset)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(editing, "write_all", torn)
        with pytest.raises(Killed):
            edit(model, put)
    assert journal_path(model).exists()
    for reader in (read_part, read_values, lambda path: edit(path, {"eps": f32(1)}, dry_run=True)):
        with pytest.raises(InputError, match="an edit of its header was interrupted"):
            reader(model)
    assert edit(model, {"eps": f32(1)}).in_place
    expected = METADATA | {"eps": f32(1)} | (put if after == 10**9 else {})
    assert_holds(model, expected)
    assert listing(model.parent).keys() == {model.name}


def test_killed_while_the_journal_is_written(model: Path) -> None:
    before = model.read_bytes()
    edit(shutil.copyfile(model, model.with_name("other.gguf")), moved(model))
    journal_path(model).write_bytes(editing._MAGIC + b"torn")
    edit(model, {"general.name": text("Tiny")})
    assert model.read_bytes() == before
    assert not journal_path(model).exists()


def test_a_journal_of_another_file_is_dropped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(descriptor: int, data: bytes, offset: int) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(editing, "write_all", torn)
        with pytest.raises(Killed):
            edit(model, moved(model))
    other = METADATA | {"general.name": text("Huge"), "llama.block_count": u32(80)}
    write(model, other)
    edit(model, {"eps": f32(1)})
    assert_holds(model, other | {"eps": f32(1)})


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["posix_fallocate", "copy_file_range", "pread", "fsync"])
def test_a_full_disk_leaves_the_file_alone(model: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = listing(model.parent)
    with monkeypatch.context() as patch:
        if where == "pread":
            patch.setattr(stream, "_copy_ranges", lambda *_: 0)
        patch.setattr(os, where, no_space, raising=False)
        with pytest.raises(ResourceError, match="No space left"):
            edit(model, {"general.name": text("x" * 1000)})
    assert listing(model.parent) == before


def test_copies_without_the_kernels_help(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EXDEV, "")

    monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    monkeypatch.setattr(stream, "_CHUNK", 100)
    for name in ("x" * 1000, "y" * 2000):
        assert not edit(model, {"general.name": text(name)}).in_place
        assert_holds(model, METADATA | {"general.name": text(name)})
        monkeypatch.delattr(os, "copy_file_range", raising=False)


def test_a_copy_that_does_not_read_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(model.parent)
    monkeypatch.setattr(stream, "fill", lambda descriptor, place, tensors: os.pwrite(descriptor, b"JUNK", 0))
    monkeypatch.setattr(editing, "fill", stream.fill)
    with pytest.raises(VerificationError, match="does not read back"):
        edit(model, {"general.name": text("x" * 1000)})
    assert listing(model.parent) == before


def survives(path: Path, action: Callable[[], object], step: int) -> bool:
    """Does it in a process that ends before its system call number `step`; returns whether it came that far."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > step:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        for name in ("pwrite", "fsync", "unlink", "replace", "ftruncate", "open"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("put", [{"general.name": text("Tin"), "empty": text("x")}, {"general.name": text("x" * 999)}])
def test_killed_at_any_step(tmp_path: Path, put: dict[str, Value]) -> None:
    """The file is the old or the new one, or says that it must be repaired, and the next edit does."""
    path, step, states = tmp_path / "m.gguf", 0, []
    old, new = write(path).read_bytes(), b""
    while not new:
        path.write_bytes(old)
        if not survives(path, lambda: edit(path, put), step):
            new = path.read_bytes()
        try:
            read_part(path)
            states.append(path.read_bytes())
        except InputError as error:
            assert "interrupted" in error.message  # noqa: PT017
        edit(path, {"eps": f32(2)})
        done = encoded(read_values(path))["general.name"] == put["general.name"].encode()
        assert_holds(path, METADATA | (put if done else {}) | {"eps": f32(2)})
        step += 1
    assert step > 5
    assert set(states) == {old, new}
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".partial")] == [path.name]


@pytest.mark.parametrize("seed", range(3))
def test_random_edits(tmp_path: Path, seed: int) -> None:
    chance, path = random.Random(seed), write(tmp_path / "m.gguf")
    now = dict(METADATA)
    makers: list[Callable[[], Value]] = [
        lambda: text("y" * chance.randrange(60)),
        lambda: u32(chance.randrange(100)),
        lambda: integers(range(chance.randrange(8))),
        lambda: texts(["", "ab", "ü"][: chance.randrange(4)]),
    ]
    for _ in range(20):
        keys = [*now, "a", "b", "c"]
        put = {key: chance.choice(makers)() for key in chance.sample(keys, chance.randrange(3))}
        remove = [key for key in now if key not in put and chance.random() < 0.1]
        edit(path, put, remove)
        now = {key: value for key, value in (now | put).items() if key not in remove}
        assert_holds(path, now)


# --- comparing


def test_parts_of_the_gguf_package_are_one_model(tmp_path: Path) -> None:
    paths = []
    for limits in ({}, {"split_max_tensors": 2}):
        writer = gguf.GGUFWriter(tmp_path / f"{len(limits)}.gguf", "llama", **limits)
        for name in "abcde":
            writer.add_tensor(name, torch.full((2, 3), float(ord(name))).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(next(tmp_path.glob(f"{len(limits)}*.gguf")))
    found = compare(*paths, contents=True)
    empty = {"added": {}, "removed": {}, "changed": {}}
    assert (found["metadata"], found["tensors"], found["differing"]) == (empty, empty, [])


def test_a_big_endian_file_against_its_little_endian_twin(tmp_path: Path) -> None:
    values = torch.arange(60, dtype=torch.float32).reshape(12, 5).numpy()
    blocks = contents("q4_0", (8, 64), 0).numpy().reshape(-1, 18)
    turned = blocks.copy()
    turned[:, [0, 1]] = blocks[:, [1, 0]]
    paths = [tmp_path / "little.gguf", tmp_path / "big.gguf"]
    for path, order, raw in zip(paths, gguf.GGUFEndian, (blocks, turned), strict=True):
        writer = gguf.GGUFWriter(path, "llama", endianess=order)
        writer.add_token_list([f"t{i}" for i in range(300)])
        writer.add_tensor("plain", values)
        writer.add_tensor("blocks", raw.reshape(8, 36), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    found = compare(*paths, contents=True)
    assert (found["metadata"]["changed"], found["tensors"]["changed"], found["differing"]) == ({}, {}, [])


def test_a_model_does_not_differ_from_itself(model: Path, tmp_path: Path) -> None:
    parts = write_parts(tmp_path, 3)
    found = compare(model, parts[0], contents=True)
    empty = {"added": {}, "removed": {}, "changed": {}}
    assert (found["metadata"], found["tensors"], found["differing"]) == (empty, empty, [])
    one, other = found["models"]
    assert one["bytes"] == model.stat().st_size
    assert other["bytes"] == sum(part.stat().st_size for part in parts)
    weights = sum(torch.Size(shape).numel() for _, shape in SHAPES.values())
    nbytes = sum(tensor.nbytes for tensor in TENSORS.values())
    for each in (one, other):
        assert (each["tensors"], each["weights"], each["tensor_bytes"]) == (5, weights, nbytes)
        assert each["bits_per_weight"] == pytest.approx(8 * nbytes / weights)
        assert sum(each["types"].values()) == nbytes
        assert each["types"]["f32"] == 5 * 4 + 64 * 4
    assert compare(model, model)["differing"] is None


def test_differences(tmp_path: Path, model: Path) -> None:
    other = write(tmp_path / "other.gguf")
    tokens = texts([f"token{i}" for i in range(299)] + ["last"])
    nan = Value(Kind.F32, float("nan"))
    put = {"eps": Value(Kind.F64, 1e-5), "new": integers([1]), "tokenizer.ggml.tokens": tokens, "nan": nan}
    edit(other, put, ["big"])
    edit(model, {"nan": nan})
    raw = bytearray(other.read_bytes())
    raw[read_part(other).tensors["blk.0.w"].extent.offset + 300] ^= 1
    other.write_bytes(raw)
    found = compare(model, other, contents=True)
    json.dumps(found)
    assert found["metadata"]["added"] == {"new": {"type": "[i32]", "value": [1]}}
    assert found["metadata"]["removed"] == {"big": {"type": "u64", "value": 2**40}}
    changed = found["metadata"]["changed"]
    assert changed.keys() == {"eps", "tokenizer.ggml.tokens"}
    assert changed["eps"] == [{"type": "f32", "value": 1e-5}, {"type": "f64", "value": 1e-5}]
    one, two = changed["tokenizer.ggml.tokens"]
    assert (one["type"], one["length"], two["length"]) == ("[text]", 300, 300)
    assert len(one["sha256"]) == 64
    assert one["sha256"] != two["sha256"]
    assert found["differing"] == ["blk.0.w"]


def test_tensors_that_differ_in_type_and_shape(tmp_path: Path) -> None:
    paths = []
    for number, shapes in enumerate(
        (
            {"same": ("f32", (8,)), "type": ("f16", (2, 32)), "shape": ("f32", (2, 3)), "gone": ("f32", (1,))},
            {"same": ("f32", (8,)), "type": ("q8_0", (2, 32)), "shape": ("f32", (3, 2)), "new": ("f32", (1,))},
        )
    ):
        schemes = {n: GGMLBlock(k) if k == "q8_0" else Plain(DTYPES[k]) for n, (k, _) in shapes.items()}
        place = layout({}, [Entry(name, shape, schemes[name]) for name, (_, shape) in shapes.items()])
        paths.append(tmp_path / f"{number}.gguf")
        paths[-1].write_bytes(place.header.ljust(place.size, b"\0"))
    found = compare(*paths, contents=True)
    assert found["tensors"] == {
        "added": {"new": {"type": "f32", "shape": [1]}},
        "removed": {"gone": {"type": "f32", "shape": [1]}},
        "changed": {
            "type": [{"type": "f16", "shape": [2, 32]}, {"type": "q8_0", "shape": [2, 32]}],
            "shape": [{"type": "f32", "shape": [2, 3]}, {"type": "f32", "shape": [3, 2]}],
        },
    }
    assert found["differing"] == []
