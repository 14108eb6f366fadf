"""What we write as GGUF, read by llama.cpp's own C reader."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.formats.gguf.container import read_part
from quantize.formats.gguf.edit import edit
from quantize.formats.gguf.layout import Entry, layout
from quantize.formats.gguf.metadata import LETTERS, Kind, Value, f32, flag, text, texts, u32
from quantize.formats.gguf.split import part_names, split_metadata
from quantize.kernels.cpu.ggml import BLOCKS
from quantize.schemes import DTYPES, GGMLBlock, Plain

PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[2] / ".peers"))
FOLDER = Path(os.environ.get("QUANTIZE_LLAMA_CPP", PEERS / "llamacpp/bin")).absolute()
LIBRARY = next((file for end in ("so", "dylib") if (file := FOLDER / f"libggml-base.{end}").exists()), None)

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(LIBRARY is None, reason=f"no libggml-base in {FOLDER}: 'make peers' or set QUANTIZE_LLAMA_CPP"),
]

METADATA = {
    "general.architecture": text("llama"),
    **{f"one.{k.name}": Value(k, 100) for k in LETTERS if k not in (Kind.BOOL, Kind.F32, Kind.F64)},
    **{f"some.{k.name}": Value(k, [1, 2, 100], True) for k in LETTERS if k is not Kind.BOOL},
    "f32": f32(0.1),
    "f64": Value(Kind.F64, 0.1),
    "no": flag(False),
    "yes": flag(True),
    "flags": Value(Kind.BOOL, [True, False], True),
    "words": texts(["ä", "", "b c"] * 200),
    "no words": texts([]),
    "nothing": text(""),
}
SHAPES = {
    **{kind: (kind, (2, 512)) for kind in BLOCKS},
    "experts": ("q4_k", (3, 2, 256)),
    "odd": ("f32", (3, 5)),
    "row": ("f32", (1, 7)),
    "name that is as long as a name may be: sixty-three bytes in all": ("i8", (1,)),
}


class _Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


class Reader:
    """A file as the C functions see it."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(LIBRARY))
        start = self._library.gguf_init_from_file
        start.restype, start.argtypes = ctypes.c_void_p, (ctypes.c_char_p, _Parameters)
        self._context = start(str(path).encode(), _Parameters(True, None))
        if not self._context:
            raise ValueError(f"{path}: refused")

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._library, f"gguf_{name}")
        function.restype = result
        return function(ctypes.c_void_p(self._context), *arguments)

    def metadata(self) -> dict[str, tuple[int, Any]]:
        count = self.call("get_n_kv", ctypes.c_int64)
        found = {}
        for i in map(ctypes.c_int64, range(count)):
            kind = self.call("get_kv_type", ctypes.c_int, i)
            found[self.call("get_key", ctypes.c_char_p, i).decode()] = kind, self.value(i, Kind(kind))
        return found

    def value(self, i: ctypes.c_int64, kind: Kind) -> Any:
        if kind is Kind.TEXT:
            return self.call("get_val_str", ctypes.c_char_p, i).decode()
        if kind is not Kind.ARRAY:
            return self.call(f"get_val_{kind.name.lower()}", ctype(kind), i)
        element = Kind(self.call("get_arr_type", ctypes.c_int, i))
        count = self.call("get_arr_n", ctypes.c_size_t, i)
        if element is Kind.TEXT:
            return [self.call("get_arr_str", ctypes.c_char_p, i, ctypes.c_size_t(j)).decode() for j in range(count)]
        data = ctypes.cast(self.call("get_arr_data", ctypes.c_void_p, i), ctypes.POINTER(ctype(element)))
        return data[:count]

    def tensors(self) -> dict[str, tuple[int, int, int]]:
        start = self.call("get_data_offset", ctypes.c_size_t)
        found = {}
        for i in map(ctypes.c_int64, range(self.call("get_n_tensors", ctypes.c_int64))):
            name = self.call("get_tensor_name", ctypes.c_char_p, i).decode()
            offset = start + self.call("get_tensor_offset", ctypes.c_size_t, i)
            size = self.call("get_tensor_size", ctypes.c_size_t, i)
            found[name] = (self.call("get_tensor_type", ctypes.c_int, i), offset, size)
        return found


def ctype(kind: Kind) -> Any:
    others = {Kind.F32: ctypes.c_float, Kind.F64: ctypes.c_double, Kind.BOOL: ctypes.c_bool}
    sign = "u" if kind.name.startswith("U") else ""
    return others[kind] if kind in others else getattr(ctypes, f"c_{sign}int{kind.name[1:]}")


def write(
    path: Path, metadata: Mapping[str, Value], all_dims: bool = False, names: Sequence[str] = tuple(SHAPES)
) -> Path:
    entries = []
    for name in names:
        kind, shape = SHAPES[name]
        scheme = Plain(DTYPES[kind]) if BLOCKS[kind].weights == 1 else GGMLBlock(kind)
        entries.append(Entry(name, shape, scheme))
    place = layout(metadata, entries, all_dims=all_dims)
    raw = bytearray(place.header.ljust(place.size, b"\0"))
    for number, (offset, nbytes) in enumerate(place.where.values()):
        raw[offset : offset + nbytes] = bytes([number]) * nbytes
    path.write_bytes(raw)
    return path


def assert_agrees(path: Path, metadata: Mapping[str, Value]) -> None:
    """llama.cpp reads what was meant, and what our own reader reads."""
    reader, part = Reader(path), read_part(path)
    assert reader.call("get_version", ctypes.c_uint32) == 3
    found = reader.metadata()
    assert list(found) == list(metadata)
    for key, value in metadata.items():
        kind, data = found[key]
        assert kind == (Kind.ARRAY if value.array else value.kind)
        assert Value(value.kind, data, value.array).encode() == value.encode(), key
    ours = {n: (BLOCKS[str(s.scheme)].id, s.extent.offset, s.extent.nbytes) for n, s in part.tensors.items()}
    assert reader.tensors() == ours


@pytest.mark.parametrize("alignment", [None, 16, 64, 1024])
@pytest.mark.parametrize("all_dims", [False, True])
def test_layout(tmp_path: Path, alignment: int | None, all_dims: bool) -> None:
    metadata = METADATA | ({"general.alignment": u32(alignment)} if alignment else {})
    path = write(tmp_path / "m.gguf", metadata, all_dims)
    assert_agrees(path, metadata)
    assert list(read_part(path).tensors) == list(SHAPES)


def test_edits(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", METADATA)
    metadata = dict(METADATA)
    for put in ({"f32": f32(2)}, {"nothing": text("x")}, {"long": text("y" * 5000)}, {"general.alignment": u32(128)}):
        edit(path, put)
        metadata |= put
        assert_agrees(path, metadata)


def test_parts(tmp_path: Path) -> None:
    groups = [list(SHAPES)[:9], list(SHAPES)[9:]]
    keys = split_metadata(METADATA | {"general.alignment": u32(128)}, [len(group) for group in groups])
    for name, metadata, group in zip(part_names("parts", 2), keys, groups, strict=True):
        assert_agrees(write(tmp_path / name, metadata, names=group), metadata)


def test_the_reader_refuses_what_we_refuse(tmp_path: Path) -> None:
    """The checks here stand for something: the same reader says no to a gap and to a file cut short."""
    path = write(tmp_path / "m.gguf", METADATA)
    raw = path.read_bytes()
    (tmp_path / "short.gguf").write_bytes(raw[:500])
    with pytest.raises(ValueError, match="refused"):
        Reader(tmp_path / "short.gguf")
    place = layout({}, [Entry("a", (8,), Plain(torch.float32)), Entry("b", (8,), Plain(torch.float32))])
    offset = (32).to_bytes(8, "little")
    assert place.header.count(offset) == 1
    gap = place.header.replace(offset, (64).to_bytes(8, "little")).ljust(place.size + 32, b"\0")
    (tmp_path / "gap.gguf").write_bytes(gap)
    with pytest.raises(ValueError, match="refused"):
        Reader(tmp_path / "gap.gguf")
