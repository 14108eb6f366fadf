"""The GGUF container: our layout against the gguf package's reader, its files against ours, in both byte orders."""

from __future__ import annotations

import argparse
import os
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.scripts import gguf_convert_endian
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.container import tensor_bytes, write_all
from quantize.formats.gguf.container import Part, read_part, read_parts
from quantize.formats.gguf.header import read_values
from quantize.formats.gguf.layout import Entry, layout
from quantize.formats.gguf.metadata import LETTERS, Kind, Value, flag, integers, text, texts, u32
from quantize.formats.gguf.split import part_names, split_metadata
from quantize.kernels.cpu.ggml import BLOCKS
from quantize.schemes import DTYPES, GGMLBlock, Plain, Scheme

FILE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
PLAIN = sorted(name for name, block in BLOCKS.items() if block.weights == 1)
GRIDS = [name for name, block in BLOCKS.items() if block.weights > 1 and name != "q2_0"]  # gguf 0.19 lacks q2_0
# The blocks as C declares them, to be packed in either byte order.
STRUCTS = {
    "q1_0": "H16s", "q4_0": "H16s", "q4_1": "HH16s", "q5_0": "HI16s", "q5_1": "HHI16s", "q8_0": "H32s",
    "q2_k": "16s64sHH", "q3_k": "32s64s12sH", "q4_k": "HH12s128s", "q5_k": "HH12s32s128s", "q6_k": "128s64s16sH",
    "iq2_xs": "H32H8s", "iq2_s": "H64s8s8s", "iq3_xxs": "H64s8I", "iq3_s": "H64s8s32s4s", "iq1_s": "H32s8H",
    "iq1_m": "32s16s4H", "iq4_nl": "H16s", "iq4_xs": "HH4s128s", "tq1_0": "48s4sH", "tq2_0": "64sH",
    "mxfp4": "B16s", "nvfp4": "4s32s",
}  # fmt: skip


def scheme_of(name: str) -> Scheme:
    return Plain(DTYPES[name]) if BLOCKS[name].weights == 1 else GGMLBlock(name)


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bits: the container does not look inside."""
    generator = np.random.default_rng(seed)
    block = BLOCKS[name]
    width = shape[-1] // block.weights * block.nbytes
    raw = generator.integers(0, 256, (*shape[:-1], width), dtype=np.uint8)
    tensor = torch.from_numpy(raw)
    return tensor.view(DTYPES[name]).reshape(shape) if block.weights == 1 else tensor


def write(
    path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[str, tuple[int, ...], Tensor]]
) -> Path:
    """Writes with our own layout, the tensors in reverse order."""
    place = layout(metadata, [Entry(name, shape, scheme_of(kind)) for name, (kind, shape, _) in tensors.items()])
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    os.truncate(descriptor, place.size)
    write_all(descriptor, place.header, 0)
    for name, (_, _, tensor) in reversed(list(tensors.items())):
        write_all(descriptor, tensor_bytes(tensor), place.where[name][0])
    os.close(descriptor)
    return path


def make(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
) -> dict[str, tuple[str, tuple[int, ...], Tensor]]:
    return {
        name: (kind, shape, random_tensor(kind, shape, i)) for i, (name, (kind, shape)) in enumerate(shapes.items())
    }


def encoded(values: Mapping[str, Value]) -> dict[str, bytes]:
    return {key: value.encode() for key, value in values.items()}


# --- metadata

RANGES = {kind: np.iinfo(letter) for kind, letter in LETTERS.items() if letter not in "fd?"}
ELEMENTS: dict[Kind, st.SearchStrategy[Any]] = {
    **{kind: st.integers(int(limits.min), int(limits.max)) for kind, limits in RANGES.items()},
    Kind.F32: st.floats(width=32),
    Kind.F64: st.floats(),
    Kind.BOOL: st.booleans(),
    Kind.TEXT: st.text(st.characters(codec="utf-8"), max_size=20),
}
KINDS = st.sampled_from(sorted(ELEMENTS))
VALUES = KINDS.flatmap(
    lambda kind: st.one_of(
        st.builds(Value, st.just(kind), ELEMENTS[kind]),
        st.builds(Value, st.just(kind), st.lists(ELEMENTS[kind], max_size=8), st.just(True)),
    )
)
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@FILE
@given(metadata=st.dictionaries(KEYS, VALUES, max_size=6).filter(lambda made: "general.alignment" not in made))
def test_metadata_comes_back_bit_for_bit(tmp_path: Path, metadata: dict[str, Value]) -> None:
    path = write(tmp_path / "m.gguf", metadata, {})
    assert encoded(read_values(path)) == encoded(metadata)
    part = read_part(path)
    assert list(part.metadata) == list(metadata)
    for key, value in metadata.items():
        assert part.value(key).encode() == value.encode()
        if value.array:
            assert Value(value.kind, part.array(key), True).encode() == value.encode()
    fields = gguf.GGUFReader(path).fields
    for key, value in metadata.items():
        if not value.array or value.data:  # the package's reader fails on empty arrays
            assert repr(fields[key].contents()) == repr(read_values(path)[key].data) or value.kind is Kind.F32


@pytest.mark.parametrize("kind", sorted(ELEMENTS), ids=lambda kind: kind.name)
def test_long_arrays_are_left_and_read_when_asked_for(tmp_path: Path, kind: Kind) -> None:
    elements = {Kind.TEXT: ["", "ä", "<s>"], Kind.BOOL: [True, False], Kind.F32: [0.1, -2.5], Kind.F64: [0.1, 1e300]}
    cycle = elements.get(kind, [0, 1, 127])
    value = Value(kind, [cycle[i % len(cycle)] for i in range(1000)], array=True)
    path = write(tmp_path / "m.gguf", {"before": u32(1), "long": value, "after": text("x")}, {})
    part = read_part(path)
    assert part.metadata["long"]["length"] == 1000
    assert part.metadata["after"] == "x"
    assert part.value("long").encode() == value.encode()
    read = part.array("long")
    assert read == (pytest.approx(value.data) if kind is Kind.F32 else value.data)
    for key in ("before", "absent"):
        with pytest.raises(InputError, match=f"lacks the array '{key}'"):
            part.array(key)


def test_float32_reads_as_the_config_had_it(tmp_path: Path) -> None:
    metadata = {"eps": Value(Kind.F32, 1e-5), "some": Value(Kind.F32, [0.1, 1e6], array=True)}
    part = read_part(write(tmp_path / "m.gguf", metadata, {}))
    assert part.metadata == {"eps": 1e-5, "some": [0.1, 1e6]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Value(Kind.U8, 256), "u8 cannot hold"),
        (Value(Kind.U32, -1), "u32 cannot hold"),
        (Value(Kind.I64, 2**63), "i64 cannot hold"),
        (Value(Kind.U32, 1.0), "u32 cannot hold a value of type float"),
        (Value(Kind.U32, True), "u32 cannot hold a value of type bool"),
        (Value(Kind.F32, "1"), "f32 cannot hold a value of type str"),
        (Value(Kind.F32, 1e39), "f32 cannot hold"),
        (Value(Kind.BOOL, 1), "bool cannot hold a value of type int"),
        (Value(Kind.TEXT, b"raw"), "text cannot hold a value of type bytes"),
        (Value(Kind.TEXT, "\ud800"), "surrogates not allowed"),
        (Value(Kind.I32, [1, "2"], True), "i32 cannot hold a value of type str"),
    ],
    ids=lambda value: value.type if isinstance(value, Value) else "",
)
def test_values_that_do_not_fit_are_refused(value: Value, message: str) -> None:
    with pytest.raises(InputError, match=f"metadata key 'some.key': .*{message}"):
        layout({"some.key": value}, [])


# --- layout


@pytest.mark.parametrize("alignment", [None, 1, 8, 64, 4096])
def test_files_are_read_by_the_gguf_package(tmp_path: Path, alignment: int | None) -> None:
    metadata = {"general.architecture": text("llama"), "general.name": text("Größe"), "flag": flag(True)}
    if alignment:
        metadata["general.alignment"] = u32(alignment)
    tensors = make(
        {
            "a": ("f32", (3, 5)),
            "odd": ("i8", (7,)),
            "q": ("q4_k", (2, 512)),
            "experts": ("iq3_xxs", (3, 2, 256)),
            "small": ("q8_0", (64,)),
            "b": ("bf16", (2, 3, 1, 4)),
        }
    )
    path = write(tmp_path / "m.gguf", metadata, tensors)
    reader = gguf.GGUFReader(path)
    assert reader.alignment == (alignment or 32)
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    assert path.stat().st_size % reader.alignment == 0
    end = reader.data_offset
    for tensor in reader.tensors:
        kind, shape, value = tensors[tensor.name]
        assert (tensor.tensor_type.name.lower(), tuple(int(n) for n in tensor.shape[::-1])) == (kind, shape)
        assert tensor.data.tobytes() == bytes(tensor_bytes(value))
        assert tensor.data_offset == end  # llama.cpp refuses gaps
        end += -(-int(tensor.n_bytes) // (alignment or 32)) * (alignment or 32)
    assert end == path.stat().st_size
    part = read_part(path)
    assert all(
        torch.equal(part.tensors[n].read().view(torch.uint8), v.view(torch.uint8)) for n, (*_, v) in tensors.items()
    )
    gaps = bytearray(path.read_bytes()[part.start :])
    for stored in part.tensors.values():
        begin = stored.extent.offset - part.start
        gaps[begin : begin + stored.extent.nbytes] = bytes(stored.extent.nbytes)
    assert not any(gaps)


@pytest.mark.parametrize("kind", [*PLAIN, *GRIDS])
def test_every_type_keeps_its_number_and_size(tmp_path: Path, kind: str) -> None:
    tensors = make({"t": (kind, (2, 256)), "u": (kind, (256,))})
    path = write(tmp_path / "m.gguf", {}, tensors)
    reader, part = gguf.GGUFReader(path), read_part(path)
    for tensor in reader.tensors:
        assert (tensor.tensor_type.name.lower(), tensor.tensor_type) == (kind, BLOCKS[kind].id)
        assert tensor.n_bytes == part.tensors[tensor.name].extent.nbytes == tensors[tensor.name][2].nbytes
        assert part.tensors[tensor.name].scheme == scheme_of(kind)


@pytest.mark.parametrize(
    ("shape", "dims", "kept"),
    [
        ((), (1,), (1,)),
        ((5,), (5,), (5,)),
        ((1, 5), (5,), (5, 1)),
        ((1, 1, 5), (5,), (5, 1, 1)),
        ((5, 1), (1, 5), (1, 5)),
        ((2, 1, 5), (5, 1, 2), (5, 1, 2)),
        ((1,), (1,), (1,)),
        ((1, 1), (1,), (1, 1)),
    ],
)
def test_dimensions(tmp_path: Path, shape: tuple[int, ...], dims: tuple[int, ...], kept: tuple[int, ...]) -> None:
    for all_dims, expected in ((False, dims), (True, kept)):
        place = layout({}, [Entry("t", shape, Plain(torch.float32))], all_dims=all_dims)
        path = tmp_path / "m.gguf"
        path.write_bytes(place.header.ljust(place.size, b"\0"))
        assert tuple(int(n) for n in gguf.GGUFReader(path).tensors[0].shape) == expected
        assert read_part(path).tensors["t"].shape == expected[::-1]


def test_empty_texts_and_arrays_are_written(tmp_path: Path) -> None:
    metadata = {"empty": text(""), "none": integers([]), "words": texts(["", ""])}
    assert read_values(write(tmp_path / "m.gguf", metadata, {})) == metadata


F32 = Plain(torch.float32)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Entry("n" * 64, (2,), F32)], "the tensor name 'n+' has 64 bytes"),
        ([Entry("ü" * 32, (2,), F32)], "has 64 bytes"),
        ([Entry("", (2,), F32)], "the tensor name '' has 0 bytes"),
        ([Entry("a\0b", (2,), F32)], r"the tensor name 'a\\x00b' has a NUL"),
        ([Entry("\ud800", (2,), F32)], "is not Unicode"),
        ([Entry("t", (2,), F32), Entry("t", (3,), F32)], "'t' would be there twice"),
        ([Entry("t", (2, 0), F32)], r"no tensor of shape \[2, 0\]"),
        ([Entry("t", (1, 1, 1, 1, 2), F32)], r"no tensor of shape \[1, 1, 1, 1, 2\]"),
        ([Entry("t", (2**32, 2**32), F32)], "no tensor of shape"),
        ([Entry("t", (2, 40), GGMLBlock("q8_0"))], "its width 40 is no multiple of the block size 32 of q8_0"),
        ([Entry("t", (2,), Plain(torch.float8_e4m3fn))], "GGUF files hold no f8_e4m3"),
    ],
)
def test_tensors_that_no_file_can_hold(entries: list[Entry], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layout({}, entries)


@pytest.mark.parametrize("key", ["", "k" * 65536, "a\0b", "\ud800"], ids=["empty", "long", "nul", "surrogate"])
def test_keys_that_no_file_can_hold(key: str) -> None:
    with pytest.raises(InputError, match="the key"):
        layout({key: u32(1)}, [])
    assert layout({"k" * 65535: u32(1), "ü" * 63: u32(1)}, [Entry("n" * 63, (2,), F32)])


@pytest.mark.parametrize("value", [u32(0), u32(48), Value(Kind.U64, 32), text("32"), integers([32])])
def test_alignment_is_a_power_of_two(value: Value) -> None:
    with pytest.raises(InputError, match=r"general\.alignment is"):
        layout({"general.alignment": value}, [])


# --- big-endian


def big_endian(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[str, Tensor]]) -> Path:
    """Writes with the gguf package, which turns round whole arrays only: blocks are packed anew here."""
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    kinds = {value.value: value for value in gguf.GGUFValueType}
    for key, value in metadata.items():
        if value.array:
            writer.add_key_value(key, value.data, gguf.GGUFValueType.ARRAY, sub_type=kinds[value.kind])
        else:
            writer.add_key_value(key, value.data, kinds[value.kind])
    for name, (kind, tensor) in tensors.items():
        number = gguf.GGMLQuantizationType(BLOCKS[kind].id)
        if kind in STRUCTS:
            raw = bytes(tensor_bytes(tensor))
            packed = b"".join(
                struct.pack(">" + STRUCTS[kind], *numbers) for numbers in struct.iter_unpack("<" + STRUCTS[kind], raw)
            )
            array = np.frombuffer(packed, np.uint8).reshape(tensor.shape)
        else:
            array = tensor.view(torch.int16).numpy() if kind in ("bf16", "f16") else tensor.numpy()
        writer.add_tensor(name, array, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", sorted(ELEMENTS), ids=lambda kind: kind.name)
def test_big_endian_metadata(tmp_path: Path, kind: Kind) -> None:
    elements: dict[Kind, list[Any]] = {
        Kind.TEXT: ["ä", "", "b c"],
        Kind.BOOL: [True, False],
        Kind.F32: [0.1, -2.5],
        Kind.F64: [0.1, 1e300],
    }
    some = elements.get(kind, [1, 2, 100])
    metadata = {"one": Value(kind, some[0]), "some": Value(kind, some, True), "long": Value(kind, some * 200, True)}
    path = big_endian(tmp_path / "m.gguf", metadata, {})
    assert read_part(path).big_endian
    found = encoded(read_values(path))
    assert {key: found[key] for key in metadata} == encoded(metadata)


@pytest.mark.parametrize("kind", [*PLAIN, *STRUCTS])
def test_big_endian_tensors(tmp_path: Path, kind: str) -> None:
    if kind in STRUCTS:
        assert struct.calcsize("<" + STRUCTS[kind]) == BLOCKS[kind].nbytes
    tensors = {"t": random_tensor(kind, (4, 512)), "u": random_tensor(kind, (256,), 1)}
    path = big_endian(tmp_path / "m.gguf", {}, {name: (kind, tensor) for name, tensor in tensors.items()})
    part = read_part(path)
    for name, tensor in tensors.items():
        stored = part.tensors[name]
        assert stored.scheme == scheme_of(kind)
        assert bytes(tensor_bytes(stored.read())) == bytes(tensor_bytes(tensor))
    assert bytes(tensor_bytes(part.tensors["t"].read(1, 3))) == bytes(tensor_bytes(tensors["t"][1:3]))
    assert read_parts(path)[0].tensors.keys() == tensors.keys()


def test_big_endian_files_of_the_gguf_packages_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["f32", "f16", "bf16", *(kind.name.lower() for kind in gguf_convert_endian.byteswap_tensors)]
    tensors = make({kind: (kind, (2, 256)) for kind in kinds})
    path = write(tmp_path / "m.gguf", {"general.architecture": text("llama"), "n": u32(7)}, tensors)
    monkeypatch.setattr("builtins.input", lambda _: "YES")
    reader = gguf.GGUFReader(path, "r+")
    gguf_convert_endian.convert_byteorder(reader, argparse.Namespace(order="big", dry_run=False))
    del reader
    part = read_part(path)
    assert part.big_endian
    assert part.metadata == {"general.architecture": "llama", "n": 7}
    for name, (_, _, tensor) in tensors.items():
        assert bytes(tensor_bytes(part.tensors[name].read())) == bytes(tensor_bytes(tensor)), name


def test_big_endian_type_that_cannot_be_read(tmp_path: Path) -> None:
    tensor = random_tensor("iq2_xxs", (2, 256))
    path = big_endian(tmp_path / "m.gguf", {}, {"t": ("iq2_xxs", tensor.contiguous())})
    with pytest.raises(InputError, match=f"{path}: iq2_xxs in big-endian order cannot be read"):
        read_part(path).tensors["t"].read()


# --- broken files


def raw_header(pairs: Sequence[bytes] = (), infos: Sequence[bytes] = (), order: str = "<") -> bytes:
    counts = struct.pack(f"{order}IQQ", 3, len(infos), len(pairs))
    return b"GGUF" + counts + b"".join(pairs) + b"".join(infos)


def raw_text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def raw_info(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    return raw_text(name.encode()) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw_header([raw_text(b"k") + struct.pack("<IIQ", 9, 9, 1)]), "its key 'k' is an array of arrays"),
        (raw_header([raw_text(b"k") + struct.pack("<I", 13)]), "its key 'k' has a value of the unknown type 13"),
        (
            raw_header([raw_text(b"k") + struct.pack("<IIQ", 9, 77, 1)]),
            "'k' has a value of the unknown type 77",
        ),
        (raw_header([raw_text(b"") + struct.pack("<II", 4, 1)]), "holds the key ''"),
        (raw_header([raw_text(b"k") + struct.pack("<II", 4, 1)] * 2), "holds the key 'k' twice"),
        (raw_header([raw_text(b"\xff") + struct.pack("<II", 4, 1)]), r"not UTF-8: b'\\xff'"),
        (raw_header([raw_text(b"k") + struct.pack("<I", 8) + raw_text(b"\xff")]), "not UTF-8"),
        (raw_header([raw_text(b"k") + struct.pack("<IIQ", 9, 4, 2**62)]), "truncated inside its header"),
        (raw_header([raw_text(b"k") + struct.pack("<IIQ", 9, 8, 2**62)]), "truncated inside its header"),
        (raw_header([raw_text(b"k") + struct.pack("<IIQQ", 9, 8, 2, 2**64 - 1)]), "truncated inside its header"),
        (raw_header([], [raw_info("t", [1, 1, 1, 1, 1], 0, 0)]), "has 5 dimensions"),
        (raw_header([], [raw_info("t", [4], 4, 0)]), "'t' has the unknown GGML type 4"),
        (raw_header([], [raw_info("t", [2**63, 2**63], 0, 0)]), "truncated: tensor 't' ends at byte"),
        (raw_header([], [raw_info("t", [8, 0], 0, 0)]), r"'t' is empty: \[0, 8\]"),
        (raw_header([], [raw_info("t", [40], 8, 0)]), "'t': its width 40 is no multiple of the block size 32"),
        (raw_header([], [raw_info("a", [8], 0, 0), raw_info("b", [8], 0, 16)]) + bytes(99), "'b' overlaps another"),
        (raw_header([raw_text(b"general.alignment") + struct.pack("<II", 4, 12)]), "alignment is 12, no power of two"),
        (raw_header(order=">")[:-3], "truncated inside its header"),
        (b"GGUF" + struct.pack(">IQQ", 1, 0, 0), "of version 1"),
    ],
)
def test_broken_headers(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_part(path)
    assert str(path) in caught.value.message


def read_all(path: Path) -> Part:
    part = read_part(path)
    read_values(path)
    for stored in part.tensors.values():
        stored.read()
    return part


def test_damaged_big_endian_headers_end_in_input_errors(tmp_path: Path) -> None:
    metadata = {"words": texts(["a", "bc"]), "name": text("x"), "eps": Value(Kind.F32, 1e-5)}
    tensors = {"t": ("q4_k", random_tensor("q4_k", (2, 256))), "u": ("f32", random_tensor("f32", (4, 4)))}
    path = big_endian(tmp_path / "m.gguf", metadata, tensors)
    data, chance, opened = path.read_bytes(), random.Random(0), 0
    header = read_all(path).start
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(8, header)] = chance.choice([0, 1, 9, 127, 255, chance.randrange(256)])
        path.write_bytes(damaged)
        try:
            read_all(path)
            opened += 1
        except InputError:
            pass
    assert 0 < opened < 400


# --- parts


def test_metadata_of_parts() -> None:
    old = {"split.count": Value(Kind.U16, 7), "a": u32(1), "split.no": u32(3), "split.tensors.count": u32(9)}
    assert split_metadata(old, [4]) == [{"a": u32(1)}]
    counts = {"split.count": Value(Kind.U16, 2), "split.tensors.count": Value(Kind.I32, 5)}
    first, second = split_metadata(old | {"general.alignment": u32(64)}, [2, 3])
    assert first == {"a": u32(1), "general.alignment": u32(64), "split.no": Value(Kind.U16, 0), **counts}
    assert second == {"general.alignment": u32(64), "split.no": Value(Kind.U16, 1), **counts}
    assert list(second) == ["general.alignment", "split.no", "split.count", "split.tensors.count"]
    assert part_names("M", 1) == ["M.gguf"]
    assert part_names("M", 2) == ["M-00001-of-00002.gguf", "M-00002-of-00002.gguf"]
