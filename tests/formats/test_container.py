"""The safetensors container: against the safetensors package both ways, and against hostile headers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import Piece
from quantize.formats.container import DTYPES, layout, read_header, read_rows, tensor_bytes, write_all

FILE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (0, 4), (4, 0), (2, 3, 4), (2, 0, 3)])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern of the dtype may come up: NaN payloads, subnormals, infinities; bool holds 0 and 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes with our own layout, the arrays in reverse order."""
    pieces = [Piece(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    place = layout(pieces, metadata or {})
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.truncate(descriptor, place.size)
    write_all(descriptor, place.header, 0)
    for name, value in reversed(list(tensors.items())):
        write_all(descriptor, tensor_bytes(value), place.where[name][0])
    os.close(descriptor)


def raw_file(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and bytes(tensor_bytes(one)) == bytes(
        tensor_bytes(other)
    )


@FILE
@given(st.lists(st.tuples(SHAPES, st.sampled_from(list(DTYPES.values()))), max_size=6))
def test_what_we_write_we_read(tmp_path: Path, kinds: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    tensors = {f"t{i}": random_bits(shape, dtype, i) for i, (shape, dtype) in enumerate(kinds)}
    write(tmp_path / "a", tensors, {"format": "pt"})
    extents, metadata = read_header(tmp_path / "a")
    assert metadata == {"format": "pt"}
    assert set(extents) == set(tensors)
    for name, value in tensors.items():
        assert same_bits(read_rows(extents[name]), value)
        assert extents[name].offset % value.dtype.itemsize == 0


@pytest.mark.parametrize("name", [name for name in DTYPES if name not in ("F8_E8M0",)])
def test_the_package_reads_what_we_write_and_we_what_it_writes(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    shapes = [(5, 3), (), (0,), (1,), (3,), (2, 0), (2, 2, 2)]
    tensors = {f"{name}.{i}": random_bits(shape, dtype, i) for i, shape in enumerate(shapes)}
    write(tmp_path / "ours", tensors, {"format": "pt", "note": "ä"})
    loaded = load_file(tmp_path / "ours")
    with safe_open(tmp_path / "ours", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "ä"}
    save_file(tensors, tmp_path / "theirs", metadata={"a": "b"})
    extents, metadata = read_header(tmp_path / "theirs")
    assert metadata == {"a": "b"}
    for key, value in tensors.items():
        assert same_bits(loaded[key], value)
        assert same_bits(read_rows(extents[key]), value)


def test_every_type_of_the_package_is_known() -> None:
    from safetensors.torch import _TYPES

    assert dict(_TYPES).items() <= DTYPES.items()


@pytest.mark.parametrize(
    "bits",
    [
        *(0x0001, 0x8001, 0x007F, 0x0080),  # bf16: smallest and largest subnormal, smallest normal
        *(0x7F81, 0xFFC1, 0x7FFF),  # NaN with payload, signalling and quiet
        *(0x8000, 0x7F80, 0xFF80),  # -0 and both infinities
    ],
)
def test_bfloat16_bits_survive(tmp_path: Path, bits: int) -> None:
    value = torch.tensor([bits if bits < 0x8000 else bits - 0x10000], dtype=torch.int16).view(torch.bfloat16)
    write(tmp_path / "a", {"x": value})
    assert read_rows(read_header(tmp_path / "a")[0]["x"]).view(torch.int16).item() & 0xFFFF == bits
    assert load_file(tmp_path / "a")["x"].view(torch.int16).item() & 0xFFFF == bits


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    """A transposed view, a slice and a pair that shares memory."""
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "rows": base[1:], "columns": base[:, 1:3], "whole": base, "again": base}
    write(tmp_path / "a", tensors)
    loaded = load_file(tmp_path / "a")
    for name, value in tensors.items():
        assert torch.equal(loaded[name], value)


def test_odd_sizes_do_not_misalign_what_follows(tmp_path: Path) -> None:
    tensors = {"bytes": random_bits((3,), torch.uint8, 0), "long": random_bits((2,), torch.int64, 1)}
    write(tmp_path / "a", tensors)
    extents, _ = read_header(tmp_path / "a")
    assert list(extents) == ["long", "bytes"]
    assert same_bits(load_file(tmp_path / "a")["long"], tensors["long"])


def test_aligned_pieces_keep_their_order() -> None:
    pieces = [Piece("b", torch.bfloat16, (4,)), Piece("a", torch.int32, (2,)), Piece("c", torch.bfloat16, (1,))]
    place = layout(pieces, {})
    assert list(place.where) == ["b", "a", "c"]
    assert len(place.header) % 8 == 0
    assert [offset - len(place.header) for offset, _ in place.where.values()] == [0, 8, 16]
    assert place.size == len(place.header) + 18


@FILE
@given(st.integers(0, 9), st.integers(0, 12))
def test_partial_rows(tmp_path: Path, start: int, stop: int) -> None:
    value = random_bits((9, 3, 2), torch.bfloat16, 7)
    write(tmp_path / "a", {"pad": torch.zeros(5, dtype=torch.int16), "x": value})
    extent = read_header(tmp_path / "a")[0]["x"]
    if start <= stop:
        assert same_bits(read_rows(extent, start, stop), value[start:stop].contiguous())
    assert same_bits(read_rows(extent, start), value[start:].contiguous())


def test_rows_own_their_memory(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": torch.arange(6.0).reshape(3, 2)})
    extent = read_header(tmp_path / "a")[0]["x"]
    rows = read_rows(extent, 1, 2)
    rows.zero_()
    assert read_rows(extent, 1, 2).tolist() == [[2, 3]]
    assert rows.untyped_storage().nbytes() == 8


# ------------------------------------------------------------------------------------------------------------
# Broken files


def refused(file: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert str(file) in caught.value.message
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 123\n")
    error = refused(file)
    assert "git-lfs pointer" in error.message
    assert "git lfs pull" in error.hint


@pytest.mark.parametrize("content", [b"", b"\0", b"PK\x03\x04 a zip file of pickles", b"\xff" * 64, b"\0" * 64])
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    refused(tmp_path / "a")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none").message
    assert "directory" in refused(tmp_path).message


@FILE
@given(st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    write(tmp_path / "whole", {"x": torch.zeros(4, 3), "y": torch.zeros(2, dtype=torch.int64)})
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refused(tmp_path / "cut")


def test_truncation_names_the_tensor(tmp_path: Path) -> None:
    write(tmp_path / "a", {"first": torch.zeros(4), "model.layers.3.weight": torch.zeros(4)})
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-1])
    error = refused(tmp_path / "a")
    assert "truncated" in error.message
    assert "'model.layers.3.weight'" in error.message


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": torch.zeros(100)})
    extent = read_header(tmp_path / "a")[0]["x"]
    os.truncate(tmp_path / "a", 200)
    with pytest.raises(InputError, match="ends early"):
        read_rows(extent)
    (tmp_path / "a").unlink()
    with pytest.raises(InputError, match="No such file"):
        read_rows(extent)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "no table"),
        ({"x": []}, "malformed"),
        ({"x": None}, "malformed"),
        ({"x": "dtype"}, "malformed"),
        ({"x": {}}, "malformed"),
        ({"x": {**ENTRY, "dtype": "F31"}}, "unknown type 'F31'"),
        ({"x": {**ENTRY, "dtype": ["F32"]}}, "malformed"),
        ({"x": {**ENTRY, "shape": 2}}, "malformed"),
        ({"x": {**ENTRY, "shape": [-2]}}, "malformed"),
        ({"x": {**ENTRY, "shape": [2.0]}}, "malformed"),
        ({"x": {**ENTRY, "shape": [True, 2]}}, "malformed"),
        ({"x": {**ENTRY, "shape": ["2"]}}, "malformed"),
        ({"x": {**ENTRY, "shape": [3]}}, "claims 8 bytes for shape [3]"),
        ({"x": {**ENTRY, "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, "claims 0 bytes"),
        ({"x": {**ENTRY, "data_offsets": [0]}}, "malformed"),
        ({"x": {**ENTRY, "data_offsets": [0, 8, 9]}}, "malformed"),
        ({"x": {**ENTRY, "data_offsets": [8, 0]}}, "claims -8 bytes"),
        ({"x": {**ENTRY, "data_offsets": [-8, 0]}}, "malformed"),
        ({"x": {**ENTRY, "data_offsets": [8, 16]}}, "truncated"),
        ({"x": {**ENTRY, "data_offsets": [2**62, 2**62 + 8]}}, "truncated"),
        ({"x": ENTRY, "y": ENTRY}, "'y' overlaps another"),
        ({"x": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, "'x' leaves a gap"),
        ({"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, "4 bytes after the last tensor"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path: Path, header: Any, message: str) -> None:
    assert message in refused(raw_file(tmp_path / "a", header, b"\0" * 8)).message


@pytest.mark.parametrize(
    "text", [b"{}}", b"nonsense", b'"\xff"', b'{"x": ' + b"9" * 5000 + b"}", b"[" * 100_000], ids=lambda text: text[:9]
)
def test_headers_that_are_no_json(tmp_path: Path, text: bytes) -> None:
    assert "not valid JSON" in refused(raw_file(tmp_path / "a", text)).message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(list(DTYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.one_of(st.integers(-1, 24), st.sampled_from([2**31, 2**63, 2**64, 2**200]))


@st.composite
def headers(draw: st.DrawFn) -> dict[str, Any]:
    """A sound header of two arrays in 24 bytes, with up to three places changed."""
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "I16", "shape": [4], "data_offsets": [16, 24]},
    }
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(["a", "b", "__metadata__"]))
        entry = header.get(name)
        what = draw(st.sampled_from(["entry", "key", "number", "dtype", "drop"]))
        if what == "entry" or not isinstance(entry, dict) or not {"shape", "data_offsets"} <= entry.keys():
            header[name] = draw(JSON)
        elif what == "key":
            entry[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(JSON)
        elif what == "dtype":
            entry["dtype"] = draw(st.sampled_from(list(DTYPES)))
        elif what == "drop":
            del header[name]
        else:
            entry[draw(st.sampled_from(["shape", "data_offsets"]))] = draw(st.lists(NUMBERS, max_size=3))
    return header


def read_all(file: Path) -> dict[str, Tensor] | None:
    """Every array, or None where the file is refused; any other error is a bug."""
    try:
        extents, _ = read_header(file)
        return {name: read_rows(extent) for name, extent in extents.items()}
    except InputError as error:
        if str(file) in error.message and "\n" not in str(error):
            return None
        raise


@settings(FILE, max_examples=300)
@given(headers())
def test_changed_headers_are_read_like_the_package_or_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    file = raw_file(tmp_path / "a", header, bytes(range(24)))
    ours = read_all(file)
    try:
        theirs = load_file(file)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError):
        return
    assert ours is not None
    assert theirs.keys() == ours.keys()
    assert all(same_bits(theirs[name], ours[name]) for name in theirs)


@settings(FILE, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(3)}, tmp_path / "a", {"k": "v"})
    content = bytearray((tmp_path / "a").read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    (tmp_path / "a").write_bytes(content)
    read_all(tmp_path / "a")
