"""Importance matrices: both file formats, and what is made of them."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from architectures import forward, load, save, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantize
from quantize.calib_data import CalibrationText
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError, ResourceError
from quantize.formats.base import NamedView
from quantize.formats.gguf import GGUFFormat
from quantize.formats.gguf.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix
from quantize.formats.gguf.view import GGUFView
from quantize.gathering import gather_importance
from quantize.imatrix import coverage, gather, match, merge, select, statistics
from quantize.kernels.cpu import ggml
from quantize.progress import silent
from quantize.settings import Settings
from quantize.skeleton import Skeleton
from quantize.statistics import Accumulator, Squares, Statistics
from quantize.sweep import Sweep
from quantize.trace import trace

UP, DOWN = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"
EXPERTS = "blk.0.ffn_up_exps.weight"


def importance(sums: object, counts: object = (4.0,)) -> Importance:
    """Returns an entry of sums, a row for each matrix, and counts."""
    return Importance(np.atleast_2d(np.asarray(sums, np.float32)), np.asarray(counts, np.float32))


def matrix(size: int = 512, **entries: Importance) -> ImportanceMatrix:
    return ImportanceMatrix({name.replace("__", "."): e for name, e in entries.items()}, ("text.txt",), 3, size)


def assert_equal(one: ImportanceMatrix, other: ImportanceMatrix) -> None:
    assert (one.datasets, one.chunk_count, one.chunk_size) == (other.datasets, other.chunk_count, other.chunk_size)
    assert list(one.entries) == list(other.entries)
    for name, entry in one.entries.items():
        np.testing.assert_array_equal(entry.sums, other.entries[name].sums)
        np.testing.assert_array_equal(entry.counts, other.entries[name].counts)


# -- means ---------------------------------------------------------------------------------------------------------


def test_means_are_sums_by_counts() -> None:
    found = importance([[2.0, 4.0], [9.0, 3.0]], [2.0, 3.0]).means()
    np.testing.assert_array_equal(found, np.array([[1, 2], [3, 1]], np.float32))
    assert found.dtype == np.float32


def test_an_expert_without_tokens_is_weighed_evenly() -> None:
    found = importance([[2.0, 4.0], [0.0, 0.0]], [2.0, 0.0]).means()
    np.testing.assert_array_equal(found, np.array([[1, 2], [1, 1]], np.float32))


def test_runs_of_zeros_are_weighed_evenly_and_least() -> None:
    sums = np.zeros((2, 1000), np.float32)
    sums[0, [20, 300, 999]] = [8, 4, 12]
    found = importance(sums, [4.0, 4.0]).means()
    assert found.dtype == np.float32
    assert (found[0, :16] == 1).all()
    assert (found[0, 16:32] == sums[0, 16:32] / 4).all()  # zeros beside a value stay
    assert (found[0, 32:288] == 1).all()
    assert found[0, 992:].tolist() == [0] * 7 + [3]  # the row's end cuts the last run off
    assert (found[1] == 1).all()


def test_the_least_importance_is_not_too_small() -> None:
    sums = np.ones((1, 64), np.float32)
    sums[0, 0], sums[0, 16:32] = 1e-30, 0
    assert importance(sums, [1.0]).means()[0, 20] == pytest.approx(1e-6, rel=0.5)


@given(st.integers(1, 3), st.integers(1, 600), st.integers(0, 99))
def test_means_are_finite_and_no_run_is_silent(count: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sums = rng.random((count, columns), np.float32) * (rng.random((count, columns)) < 0.01)
    found = Importance(sums.astype(np.float32), rng.integers(0, 3, count).astype(np.float32)).means()
    assert np.isfinite(found).all()
    assert found.dtype == np.float32
    assert all(row[start : start + 16].any() for row in found for start in range(0, columns, 16))


@pytest.mark.parametrize("kind", ["q4_0", "q3_k", "q6_k", "iq4_xs"])
@pytest.mark.parametrize("silent", [slice(0, 32), slice(16, 32), slice(256, 512), slice(0, 512)])
def test_weights_whose_input_is_always_zero_are_not_lost(kind: str, silent: slice) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2, 512)).astype(np.float32)
    sums = rng.random((1, 512)).astype(np.float32)
    sums[0, silent] = 0
    decoded = ggml.decode(kind, ggml.encode(kind, weight, importance(sums).means()[0]))
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - weight)[:, silent].mean() < 0.2


def test_other_shapes_of_the_same_values() -> None:
    older = importance([[1.0, 2, 3, 4]], [2.0])
    found = older.shaped(2, 2)
    assert found is not None
    np.testing.assert_array_equal(found.means(), [[0.5, 1], [1.5, 2]])
    np.testing.assert_array_equal(found.counts, [2, 2])
    assert older.shaped(2, 3) is None
    assert importance([[1.0], [2], [3]], [1.0, 1, 1]).shaped(1, 3) is None


# -- files ---------------------------------------------------------------------------------------------------------


def example() -> ImportanceMatrix:
    rng = np.random.default_rng(0)
    return ImportanceMatrix(
        {
            UP: importance(rng.random((1, 70)), [1024.0]),
            EXPERTS: importance(rng.random((3, 40)) * [[1], [0], [1]], [700.0, 0, 1300]),
            DOWN: importance(rng.random((1, 1)), [1024.0]),
        },
        ("one.txt", "zwei ä.txt"),
        2,
        512,
    )


def test_a_gguf_file_holds_all(tmp_path: Path) -> None:
    made, path = example(), tmp_path / "imatrix.gguf"
    write_imatrix(path, made)
    found = read_imatrix(path)
    assert_equal(found, ImportanceMatrix(dict(sorted(made.entries.items())), made.datasets, 2, 512))
    assert list(tmp_path.iterdir()) == [path]
    write_imatrix(tmp_path / "again", found)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    made, path = example(), tmp_path / "imatrix.gguf"
    write_imatrix(path, made)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == list(made.datasets)
    assert reader.fields["imatrix.chunk_count"].contents() == 2
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    names = [f"{name}.{suffix}" for name, suffix in product(sorted(made.entries), ("in_sum2", "counts"))]
    assert [tensor.name for tensor in reader.tensors] == names
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert (shapes[f"{EXPERTS}.in_sum2"], shapes[f"{EXPERTS}.counts"]) == ([40, 3], [1, 3])
    assert (shapes[f"{UP}.in_sum2"], shapes[f"{UP}.counts"]) == ([70], [1])
    for tensor in reader.tensors:
        name, _, suffix = tensor.name.rpartition(".")
        wanted = getattr(made.entries[name], {"in_sum2": "sums", "counts": "counts"}[suffix])
        np.testing.assert_array_equal(tensor.data.ravel(), wanted.ravel())


def test_an_older_file_holds_means(tmp_path: Path) -> None:
    made, path = example(), tmp_path / "imatrix.dat"
    write_imatrix(path, made, legacy=True)
    found = read_imatrix(path)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("zwei ä.txt",), 2, 0)
    assert list(found.entries) == sorted(made.entries)
    assert found.entries[EXPERTS].counts.tolist() == [3]  # pieces of 512 tokens
    for name, entry in made.entries.items():
        shaped = found.entries[name].shaped(*entry.sums.shape)
        assert shaped is not None
        np.testing.assert_allclose(shaped.means(), entry.means(), rtol=1e-6)
    write_imatrix(tmp_path / "again", found, legacy=True)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_an_older_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "x"
    body = struct.pack("<i1sii2f", 1, b"b", 2, 2, 6.0, 8.0) + struct.pack("<i1sii1f", 1, b"a", 0, 1, 5.0)
    path.write_bytes(struct.pack("<i", 2) + body)
    found = read_imatrix(path)
    assert (list(found.entries), found.datasets, found.chunk_count) == (["a", "b"], (), 0)
    assert [entry.means().tolist() for entry in found.entries.values()] == [[[5]], [[3, 4]]]
    path.write_bytes(struct.pack("<i", 2) + body + struct.pack("<i", 7))
    assert read_imatrix(path).chunk_count == 7


def test_an_older_file_as_a_new_one(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "dat", example(), legacy=True)
    write_imatrix(tmp_path / "gguf", read_imatrix(tmp_path / "dat"))
    found = read_imatrix(tmp_path / "gguf")
    assert found.chunk_size == 512
    assert found.entries[UP].counts.tolist() == [1024]
    np.testing.assert_allclose(found.entries[UP].means(), example().entries[UP].means(), rtol=1e-6)


def test_entries_that_no_token_reached_are_left_out_of_an_older_file(tmp_path: Path) -> None:
    made = matrix(a=importance([1.0]), b=importance([0.0], [0.0]))
    write_imatrix(tmp_path / "x", made, legacy=True)
    assert list(read_imatrix(tmp_path / "x").entries) == ["a"]
    write_imatrix(tmp_path / "x", made)
    assert list(read_imatrix(tmp_path / "x").entries) == ["a", "b"]
    with pytest.raises(InputError, match=r"x: no importance to write: no token reached a weight"):
        write_imatrix(tmp_path / "x", matrix(b=importance([0.0], [0.0])), legacy=True)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_values_that_are_no_importance_are_found_at_once(value: float, legacy: bool, tmp_path: Path) -> None:
    sums = [[1.0, 1], [1, 1], [value, 1]]
    write_imatrix(tmp_path / "x", matrix(**{"good": importance([1.0]), UP: importance(sums, [1.0, 1, 1])}), legacy)
    where = "" if legacy else " of matrix 2"
    message = rf"x: '{UP}' has 1 of 6 sums of squares{where} NaN, infinite or negative"
    with pytest.raises(InputError, match=message):
        read_imatrix(tmp_path / "x")


def test_broken_counts_are_found(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "x", matrix(a=importance([1.0], [math.nan])))
    with pytest.raises(InputError, match="'a' has 1 of 1 counts NaN"):
        read_imatrix(tmp_path / "x")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_anywhere_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_imatrix(path, matrix(a=importance([1.0, 2]), b=importance([3.0])), legacy)
    data = path.read_bytes()
    whole = len(data) - 4 - 4 - len("text.txt") if legacy else len(data) - 28  # padding at the end
    for length in range(0, whole, 3):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"x: "):
            read_imatrix(path)


def write_gguf(path: Path, tensors: dict[str, list[float]], kind: str = "imatrix") -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.in_sum2": [1.0, 2.0]}, "sums and counts of 'a' do not belong together"),
        ({"a.counts": [1.0, 2.0]}, "sums and counts of 'a' do not belong together"),
        ({"a.in_sum2": [1.0, 2.0, 3.0], "a.counts": [1.0, 2.0]}, "sums and counts of 'a' do not belong together"),
        ({"token_embd.weight": [1.0]}, r"tensor 'token_embd\.weight' is none of an importance matrix"),
    ],
)
def test_other_gguf_files_are_refused(tensors: dict[str, list[float]], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x", tensors)
    with pytest.raises(InputError, match=message):
        read_imatrix(tmp_path / "x")


def test_a_file_without_keys_is_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x", {"a.in_sum2": [1.0, 2.0], "a.counts": [2.0]})
    found = read_imatrix(tmp_path / "x")
    assert (found.datasets, found.chunk_count, found.chunk_size) == ((), 0, 512)
    assert found.entries["a"].means().tolist() == [[0.5, 1]]


def test_errors_of_the_system_are_ours(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: No such file"):
        read_imatrix(tmp_path / "none")
    with pytest.raises(InputError, match=r"[Ii]s a directory"):
        read_imatrix(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        write_imatrix(tmp_path / "no" / "x", example())


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_imatrix(path, example())
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_imatrix(path, matrix(a=importance([1.0])))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_names_that_llama_cpp_cannot_read_are_refused(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "x", matrix(**{"n" * 55: importance([1.0])}))
    with pytest.raises(InputError, match=r"has 64 bytes, llama\.cpp reads 63"):
        write_imatrix(tmp_path / "x", matrix(**{"n" * 56: importance([1.0])}))
    assert list(read_imatrix(tmp_path / "x").entries) == ["n" * 55]


# -- adding up, choosing, looking ----------------------------------------------------------------------------------


def test_texts_add_up() -> None:
    one = matrix(a=importance([1.0, 2]), e=importance([[1.0], [0]], [1.0, 0]))
    other = matrix(a=importance([3.0, 5], [8.0]), b=importance([1.0]), e=importance([[0.0], [4]], [0.0, 2]))
    found = merge([one, other])
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("text.txt",), 6, 512)
    assert list(found.entries) == ["a", "b", "e"]
    assert (found.entries["a"].sums.tolist(), found.entries["a"].counts.tolist()) == ([[4, 7]], [12])
    assert (found.entries["e"].sums.tolist(), found.entries["e"].counts.tolist()) == ([[1], [4]], [1, 2])


def test_older_files_are_merged_as_if_their_pieces_were_as_long() -> None:
    older = ImportanceMatrix({"e": importance([[6.0, 8]], [2.0])}, ("old",), 2, 0)
    found = merge([older, matrix(128, e=importance([[256.0], [0]], [256.0, 0]))])
    assert found.chunk_size == 128
    assert found.entries["e"].counts.tolist() == [512, 256]
    assert found.entries["e"].sums.tolist() == [[6 * 128 + 256], [8 * 128]]
    assert merge([older, older]).entries["e"].means().tolist() == [[3, 4]]


def test_files_of_different_models_do_not_merge() -> None:
    with pytest.raises(InputError, match="'a' has 2 columns in one importance matrix, 3 in another"):
        merge([matrix(a=importance([1.0, 2])), matrix(a=importance([1.0, 2, 3]))])


def test_entries_are_chosen_by_parts_of_names() -> None:
    made = matrix(**{name: importance([1.0]) for name in (UP, DOWN, EXPERTS)})
    assert list(select(made, ["ffn_up"]).entries) == [UP, EXPERTS]
    assert list(select(made, exclude=["exps", "down"]).entries) == [UP]
    assert list(select(made, ["ffn_up"], ["exps"]).entries) == [UP]
    assert select(made).entries == made.entries


def test_coverage_names_experts_that_saw_little() -> None:
    counts = [0.0, 100, 2, 100, 98, 100]
    rows = coverage(matrix(**{UP: importance([1.0]), EXPERTS: importance(np.ones((6, 2)), counts)}))
    assert [(row.name, row.experts, row.unseen, row.rare) for row in rows] == [(EXPERTS, 6, (0,), (2,))]


def test_the_figures_of_an_entry() -> None:
    values = np.array([0.0, 1, 1, 2, 16, 1e-6])
    made = matrix(
        **{
            "blk.1.attn_q.weight": importance(values * 4),
            "blk.0.attn_q.weight": importance([1.0, 0, 0, 0, 0, 0]),
            "output.weight": importance([[2.0, 2], [0, 0]], [1.0, 0]),
            "blk.9.attn_q.weight": importance([0.0, 0], [0.0]),
        }
    )
    rows = {row.name: row for row in statistics(made)}
    assert list(rows) == ["blk.1.attn_q.weight", "blk.0.attn_q.weight", "output.weight"]
    found = rows["blk.1.attn_q.weight"]
    shares = values[values > 0] / values.sum()
    assert (found.layer, found.columns) == (1, 6)
    assert found.total == pytest.approx(values.sum())
    assert (found.low, found.high) == (0, 16)
    assert found.mean == pytest.approx(values.mean())
    assert found.deviation == pytest.approx(values.std())
    assert found.active == pytest.approx(4 / 6)
    assert found.entropy == pytest.approx(-(shares * np.log2(shares)).sum())
    assert found.evenness == pytest.approx(found.entropy / math.log2(6))
    assert found.outliers == pytest.approx(1 / 6)
    assert found.likeness == pytest.approx(0)
    assert rows["blk.0.attn_q.weight"].likeness is None
    even = rows["output.weight"]
    assert (even.layer, even.columns, even.evenness, even.outliers, even.deviation) == (-1, 2, 1, 0, 0)


# -- beside a model ------------------------------------------------------------------------------------------------


def test_names_that_agree_are_matched() -> None:
    made = matrix(**{UP: importance([1.0, 2]), "x.weight": importance([1.0])})
    shapes = {"token_embd.weight": (9, 2), UP: (5, 2), DOWN: (2, 5), "output.weight": (9, 2)}
    found = match(made, shapes)
    assert list(found.found) == [UP]
    assert (found.missing, found.unused) == ((DOWN,), ("x.weight",))


def test_experts_one_by_one_serve_a_stack() -> None:
    made = matrix(**{f"blk.0.ffn_up.{e}.weight": importance([e + 1.0, 2], [2.0]) for e in (0, 2)})
    found = match(made, {EXPERTS: (3, 5, 2)})
    assert found.unused == ()
    assert found.found[EXPERTS].counts.tolist() == [2, 0, 2]
    assert found.found[EXPERTS].means().tolist() == [[0.5, 1], [1, 1], [1.5, 1]]


def test_a_stack_serves_experts_one_by_one() -> None:
    made = matrix(**{EXPERTS: importance([[1.0, 2], [3, 4]], [1.0, 2])})
    older = ImportanceMatrix({EXPERTS: importance([[1.0, 2, 3, 4]], [2.0])})
    shapes = {f"blk.0.ffn_up.{e}.weight": (5, 2) for e in (0, 1)}
    assert [entry.means().tolist() for entry in match(made, shapes).found.values()] == [[[1, 2]], [[1.5, 2]]]
    assert [entry.means().tolist() for entry in match(older, shapes).found.values()] == [[[0.5, 1]], [[1.5, 2]]]


@pytest.mark.parametrize(
    ("has", "wants", "shape"),
    [
        ("blk.3.attn_k.weight", "blk.3.attn_qkv.weight", (6, 2)),
        ("blk.3.attn_qkv.weight", "blk.3.attn_v.weight", (6, 2)),
        ("blk.3.ffn_gate.weight", "blk.3.ffn_up.weight", (6, 2)),
        ("blk.3.ffn_gate_exps.weight", "blk.3.ffn_gate_up_exps.weight", (1, 6, 2)),
        ("blk.3.ffn_gate.0.weight", "blk.3.ffn_up_exps.weight", (1, 6, 2)),
    ],
)
def test_weights_with_the_same_input_serve_each_other(has: str, wants: str, shape: tuple[int, ...]) -> None:
    found = match(matrix(**{has: importance([1.0, 2])}), {wants: shape})
    assert (found.found[wants].sums.tolist(), found.unused) == ([[1, 2]], ())


def test_a_matrix_of_another_model_is_refused() -> None:
    made = matrix(**{"model.layers.0.up": importance([1.0, 2])})
    shapes = {"token_embd.weight": (9, 2)} | {f"blk.{layer}.ffn_up.weight": (5, 2) for layer in range(24)}
    message = "x: none of the model's 24 tensors matched: the file has 'model.layers.0.up', the model 'blk.0.ffn_up"
    with pytest.raises(InputError, match=message):
        match(made, shapes, "x")
    with pytest.raises(InputError, match=r"'blk\.0\.ffn_up\.weight' has 3 values, .* \[5, 2\] needs 2"):
        match(matrix(**{UP: importance([1.0, 2, 3])}), {UP: (5, 2)})
    with pytest.raises(InputError, match=r"has 4 values, .* \[3, 5, 2\] needs 6"):
        match(matrix(**{EXPERTS: importance([[1.0, 2], [3, 4]], [1.0, 1])}), {EXPERTS: (3, 5, 2)})


def test_nothing_is_wanted_of_what_is_looked_up() -> None:
    shapes = {"token_embd.weight": (9, 2), "output.weight": (9, 2)}
    found = match(matrix(**{"token_embd.weight": importance([1.0, 2, 3]), "x": importance([1.0])}), shapes)
    assert (found.found, found.missing) == ({}, ())


# -- gathered ------------------------------------------------------------------------------------------------------


def squares(*values: float, count: int = 2) -> Squares:
    return Squares(count, torch.tensor(values))


def test_gathered_from_what_was_seen() -> None:
    hidden, first, third = squares(1, 2), squares(3, 4, count=5), squares(5, 6)
    sites = {"q": hidden, "k": hidden, "v": hidden, "e0": first, "e2": third, "stack": [first, None, third]}
    sources = {
        "attn_q": ("q",), "attn_qkv": ("q", "k", "v"), "exps": ("e0", "e1", "e2"), "lost": ("nothing",),
        "whole": ("stack",), "unseen": ("e1", "e3"),
    }  # fmt: skip
    found = gather(sources, sites.get)
    assert list(found) == ["attn_q", "attn_qkv", "exps", "whole"]
    assert found["attn_q"].sums.tolist() == found["attn_qkv"].sums.tolist() == [[2, 4]]
    for name in ("exps", "whole"):
        assert found[name].sums.tolist() == [[15, 20], [0, 0], [10, 12]]
        assert found[name].counts.tolist() == [5, 0, 2]


def test_gathered_for_known_shapes() -> None:
    hidden, first, second = squares(1, 2), squares(3, 4, count=5), squares(5, 6)
    sites = {"q": hidden, "g0": first, "u0": first, "g1": second, "u1": second}
    sources = {
        "fused": ("g0", "u0", "g1", "u1"), "alone": ("g1",), "heads": ("q",), "narrow": ("q",), "odd": ("g0", "g1"),
    }  # fmt: skip
    shapes = {"fused": (2, 8, 2), "alone": (1, 4, 2), "heads": (3, 4, 2), "narrow": (4, 1), "odd": (3, 4, 2)}
    found = gather(sources, sites.get, shapes=shapes)
    assert {name: entry.sums.tolist() for name, entry in found.items()} == {
        "fused": [[15, 20], [10, 12]], "alone": [[10, 12]], "heads": [[2, 4]] * 3,
    }  # fmt: skip


def test_gathered_for_reordered_columns() -> None:
    found = gather({"a": ("q",)}, lambda _: squares(1, 2, 3), columns={"a": torch.tensor([2, 0, 1])})
    assert found["a"].sums.tolist() == [[6, 2, 4]]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_squares_are_those_of_the_whole_statistics(counts: list[int], width: int, seed: int) -> None:
    x = torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(seed))
    total = Squares.of(x[:0])
    for part in x.split(counts):
        total = total.merge(Squares.of(part))
    assert total.count == len(x)
    if len(x):
        torch.testing.assert_close(total.mean_square, Statistics.of(x).mean_square, rtol=1e-5, atol=1e-7)


def test_squares_of_half_precision_do_not_overflow() -> None:
    assert float(Squares.of(torch.full((300, 2), 300.0).half()).mean_square.max()) == pytest.approx(90000)


def test_squares_add_up_in_the_order_of_batches() -> None:
    parts = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    totals: list[Tensor] = []
    for order in ((0, 1, 2), (2, 0, 1)):
        found: Accumulator[Squares] = Accumulator()
        for batch in order:
            found.add(batch, Squares.of(parts[batch]))
            found.finish(batch)
        assert found.total is not None
        totals.append(found.total.mean_square)
    assert torch.equal(*totals)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: save(name, tmp_path_factory.mktemp("models") / name)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_sweep_gathers_squares_alone(name: str, folder: Callable[[str], Path]) -> None:
    path, ids = folder(name), token_ids()

    def swept(needs: type, threads: int) -> dict[str, tuple[int, Tensor]]:
        checkpoint = open_checkpoint(path)
        skeleton, found = Skeleton(checkpoint), {}
        with Sweep(skeleton, checkpoint, list(ids.split(1)), threads=threads, probe=ids[:1]) as sweep:
            for stage in sweep.stages():
                sites = trace(stage, skeleton, folds=False).sites
                found |= {site: (s.count, s.mean_square) for site, s in stage.run(sites, needs).items()}
        return found

    full, first, second = swept(Statistics, 2), swept(Squares, 1), swept(Squares, 3)
    assert full.keys() == first.keys() == second.keys()
    for site, (count, mean) in first.items():
        assert full[site][0] == second[site][0] == count
        torch.testing.assert_close(mean, full[site][1], rtol=1e-5, atol=1e-7)
        assert torch.equal(mean, second[site][1])


# --- where text shows what tensors that are not stored as they are used are multiplied with


def importance_of(path: Path, ids: Tensor) -> Mapping[str, Importance]:
    checkpoint = open_checkpoint(path)
    text = CalibrationText(ids, ("text",), "", 0, ())
    view = cast(NamedView, GGUFFormat().view(checkpoint))
    skeleton = Skeleton(checkpoint)
    return gather_importance(Settings(), skeleton, checkpoint, view, text, 1, path.parent, silent).entries


def rows_into(model: Any, path: str, ids: Tensor, output: bool = False) -> Tensor:
    """What a module of the whole model gets, or gives, `[tokens, channels]`."""
    seen: list[Tensor] = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda _, args, result: seen.append(result if output else args[0]))
    forward(model, ids)
    handle.remove()
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in seen])


def assert_is(entry: Importance, expert: int, rows: Tensor) -> None:
    assert entry.counts[expert] == len(rows)
    np.testing.assert_allclose(entry.sums[expert], rows.square().sum(0).numpy(), rtol=1e-4, atol=1e-5)


def test_experts_on_their_side(folder: Callable[[str], Path]) -> None:
    """gpt-oss multiplies by `W[e]` from the right."""
    path, ids = folder("gpt-oss"), token_ids()
    model, found = load(path), importance_of(path, ids)
    into = rows_into(model, "model.layers.0.mlp.router", ids)
    with torch.no_grad():
        chosen = model.model.layers[0].mlp.router(into)[-1]
    for expert in range(4):
        rows = into[(chosen == expert).any(-1)]
        for name in ("gate", "up"):
            assert_is(found[f"blk.0.ffn_{name}_exps.weight"], expert, rows)
    assert found["blk.0.ffn_down_exps.weight"].sums.shape == (4, 96)


def test_experts_that_all_get_zeros_but_for_their_own_tokens(folder: Callable[[str], Path]) -> None:
    """llama4 hands every token to every expert, times its score; those not chosen are zero and do not count."""
    path, ids = folder("llama4"), token_ids()
    model, found = load(path), importance_of(path, ids)
    into = rows_into(model, "model.layers.1.feed_forward.experts", ids).reshape(4, ids.numel(), 64)
    experts = model.model.layers[1].feed_forward.experts
    for expert in range(4):
        rows = into[expert][into[expert].any(-1)]
        assert_is(found["blk.1.ffn_gate_exps.weight"], expert, rows)
        gate, up = (rows @ experts.gate_up_proj[expert]).detach().chunk(2, -1)
        assert_is(found["blk.1.ffn_down_exps.weight"], expert, up * torch.nn.functional.silu(gate))
    assert sum(found["blk.1.ffn_gate_exps.weight"].counts) == ids.numel()


def test_layers_on_their_side(folder: Callable[[str], Path]) -> None:
    path, ids = folder("gpt2"), token_ids()
    model, found = load(path), importance_of(path, ids)
    assert_is(found["blk.1.attn_output.weight"], 0, rows_into(model, "transformer.h.1.attn.c_proj", ids))
    assert_is(found["blk.1.ffn_down.weight"], 0, rows_into(model, "transformer.h.1.mlp.c_proj", ids))


def test_keys_that_are_multiplied_by_the_query(folder: Callable[[str], Path]) -> None:
    """In DeepSeek's files each head's keys meet the first channels of its query."""
    path, ids = folder("deepseek-v3"), token_ids()
    query = rows_into(load(path), "model.layers.0.self_attn.q_b_proj", ids, output=True).reshape(-1, 4, 32)
    found = importance_of(path, ids)
    for head in range(4):
        assert_is(found["blk.0.attn_k_b.weight"], head, query[:, head, :16])


def test_columns_in_another_order(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp repeats the key heads of linear attention in another order."""
    path, ids = folder("qwen3.5"), token_ids()
    into = rows_into(load(path), "model.layers.0.linear_attn.out_proj", ids)
    order = torch.arange(64).reshape(2, 2, 16).transpose(0, 1).flatten()
    assert_is(importance_of(path, ids)["blk.0.ssm_out.weight"], 0, into[:, order])


@pytest.mark.parametrize("name", ["gpt-oss", "gpt2", "deepseek-v3", "qwen3.5"])
def test_a_file_shows_what_its_folder_shows(name: str, tmp_path: Path) -> None:
    # yarn's factors go through a file as floats of 32 bits
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1.5e5}} if name == "gpt-oss" else {}
    path, ids = save(name, tmp_path / name, **rope), token_ids()
    file = quantize.convert(path, format="gguf", dtype="f32", out=tmp_path / "a.gguf").out
    ours, theirs = importance_of(path, ids), importance_of(file, ids)
    matrices = {n for n, info in GGUFView(open_checkpoint(path)).tensors.items() if len(info.shape) > 1}
    assert {n for n in matrices if re.search(r"(attn|ffn|ssm_(in|out)).*\.weight$", n)} <= ours.keys() == theirs.keys()
    for key, entry in ours.items():
        np.testing.assert_array_equal(theirs[key].counts, entry.counts)
        np.testing.assert_allclose(theirs[key].sums, entry.sums, rtol=1e-3, atol=1e-3, err_msg=key)
