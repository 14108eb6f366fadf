"""`run --method gptq` and `awq+gptq`, whole: what stands in folders and GGUF files, killed runs, little text, options.

Names of faults that people reported are those of the project's table of cases.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import architectures
import gguf
import gguf_models
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantize
from quantize.errors import InputError, UsageError
from quantize.writer import JOURNAL, partial_path

Cli = Callable[..., Any]
QUICK: dict[str, Any] = tiny.QUICK | {"calib_length": 128}
FOLDER: dict[str, Any] = QUICK | {"method": "gptq", "group_size": 32}
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3}
FILE: dict[str, Any] = QUICK | {"method": "gptq", "calib_samples": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model") / "Model", tokenizer=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are whole super-blocks."""
    return tiny.llama(tmp_path_factory.mktemp("wide") / "Wide", tokenizer=True, **WIDE)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral of four experts, of which each token takes one and none takes the last."""
    folder = architectures.save("mixtral", tmp_path_factory.mktemp("experts") / "Experts", num_experts_per_tok=1)
    return avoid_last(folder)


def avoid_last(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    for router in (value for name, value in tensors.items() if name.endswith("gate.weight")):
        router[3] = router[:3].mean(0)  # the mean is never the largest
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights(path: Path) -> dict[str, Tensor]:
    """Every tensor as it reads back, float32."""
    opened = quantize.open(path)
    return {name: opened.read(name).float() for name in opened.tensors}


def share(before: Tensor, after: Tensor) -> float:
    return float((after - before).square().sum() / before.square().sum())


def stored(file: Path) -> Mapping[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "format_"),
    [
        ({"bits": 3, "format": "gptq"}, "gptq"),
        ({"bits": 2, "symmetric": False, "act_order": "columns", "format": "gptq_v2"}, "gptq_v2"),
        ({"bits": 4, "format": "awq", "act_order": "none"}, "awq"),
        ({"bits": 4, "method": "awq+gptq"}, "awq"),
    ],
    ids=["3", "2-v2", "awq", "awq+gptq"],
)
def test_errors_of_the_report_are_those_of_the_folder(
    model: Path, tmp_path: Path, options: dict[str, Any], format_: str
) -> None:
    report = quantize.run(model, out=tmp_path / "Out", **FOLDER | options)
    assert report.format == format_
    assert not [note for note in report.notes if "model.layers" in note]
    before, after = weights(model), weights(tmp_path / "Out")
    assert before.keys() == after.keys()
    assert len(report.errors) == 14
    method = config(tmp_path / "Out")["quantization_config"]["quant_method"]
    assert method == ("awq" if format_ == "awq" else "gptq")
    for name, value in before.items():
        if name not in report.errors:
            folded = report.method == "awq+gptq" and "layernorm" in name
            assert folded or torch.equal(value, after[name]), name
        elif report.method == "gptq":
            assert report.errors[name] == pytest.approx(share(value, after[name]), rel=1e-3)
            assert report.errors[name] < {2: 0.5, 3: 0.2, 4: 0.05}[options["bits"]]


def test_errors_of_other_codes_than_nearest(model: Path, tmp_path: Path) -> None:
    """Feedback gives up nearness of weights for nearness of outputs."""
    ours = quantize.run(model, out=tmp_path / "Ours", **FOLDER | {"bits": 4, "symmetric": False})
    rtn = quantize.run(
        model, out=tmp_path / "Rtn", method="rtn", format="gptq", bits=4, group_size=32, symmetric=False, threads=1
    )
    assert sum(ours.errors.values()) > sum(rtn.errors.values())


def test_mixed_bits_and_kept_matrices(model: Path, tmp_path: Path) -> None:
    """Rules give single matrices other widths and groups, beside one another at one input; readers are told."""
    rules = ("*.v_proj=int8-g32-sym", "*.down_proj=int2-g32-sym", "model.layers.1.mlp.up_proj=keep")
    report = quantize.run(model, out=tmp_path / "Out", **FOLDER | {"bits": 4, "set": rules})
    before, after = weights(model), weights(tmp_path / "Out")
    assert len(report.errors) == 13
    for name, value in before.items():
        if name in report.errors:
            assert report.errors[name] == pytest.approx(share(value, after[name]), rel=1e-3)
        else:
            assert torch.equal(value, after[name])
    mean = {
        leaf: sum(e for name, e in report.errors.items() if leaf in name) / 2 for leaf in ("v_proj", "q_proj", "down")
    }
    assert mean["v_proj"] < mean["q_proj"] / 50
    assert mean["down"] > mean["q_proj"] * 5
    dynamic = config(tmp_path / "Out")["quantization_config"]["dynamic"]
    assert any(value.get("bits") == 8 for value in dynamic.values())


def test_statistics_of_a_file_are_those_of_the_float_model(model: Path, tmp_path: Path) -> None:
    """Saved by one run and used by the next: no block is passed through again, both give the same codes."""
    file = tmp_path / "statistics.safetensors"
    options = FOLDER | {"bits": 4, "statistics": file}
    saved = quantize.run(model, out=tmp_path / "Saved" / "Out", **options)
    assert file.exists()
    used = quantize.run(model, out=tmp_path / "Used" / "Out", **options)
    other = quantize.run(model, out=tmp_path / "Other" / "Out", **FOLDER | {"bits": 4})
    one, two, three = (weights(report.out) for report in (saved, used, other))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    same = [name for name in saved.errors if torch.equal(one[name], three[name])]
    # queries, keys and values of the first block see the same inputs either way, nothing else does
    assert sorted(name.split(".")[-2] for name in same) == ["k_proj", "q_proj", "v_proj"]
    assert all(".layers.0." in name for name in same)


# -- GGUF --------------------------------------------------------------------------------------------------------------


def test_errors_of_the_report_are_those_of_the_file(wide: Path, tmp_path: Path) -> None:
    """Types of many kinds, in the same places and of the same size as without feedback."""
    kinds = {"attn_q": "q2_k", "attn_k": "q3_k", "attn_v": "iq4_xs", "attn_output": "q5_0", "ffn_up": "q8_0"}
    same: dict[str, Any] = {"type": "Q4_K_M", "set": tuple(f"blk.1.{leaf}={kind}" for leaf, kind in kinds.items())}
    report = quantize.run(wide, out=tmp_path / "a.gguf", **FILE | same)
    plain = quantize.run(wide, out=tmp_path / "b.gguf", eval="none", threads=1, **same)
    base = stored(quantize.convert(wide, format="gguf", dtype="f32", out=tmp_path / "f32.gguf").out)
    held, other = stored(report.out), stored(plain.out)
    assert [(t.name, t.tensor_type, t.n_bytes) for t in held.values()] == [
        (t.name, t.tensor_type, t.n_bytes) for t in other.values()
    ]
    assert report.out.stat().st_size - plain.out.stat().st_size < 500
    differ = 0
    for name, tensor in held.items():
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if name in report.errors:
            expected = torch.from_numpy(gguf.dequantize(base[name].data, base[name].tensor_type).copy())
            assert report.errors[name] == pytest.approx(share(expected, value), rel=2e-3), name
        differ += tensor.data.tobytes() != other[name].data.tobytes()
    assert differ == 21


def test_some_tensors_of_a_file_have_no_levels(wide: Path, tmp_path: Path) -> None:
    """They are refused before any work, by the file's type and by a rule; types of all levels stand side by side."""
    with pytest.raises(InputError, match="several together"):
        quantize.plan(wide, type="IQ2_XXS", method="gptq", out=tmp_path / "a.gguf")
    with pytest.raises(UsageError, match=r"blk\.1\.ffn_up\.weight cannot be iq3_xxs: gptq rounds one weight at a time"):
        quantize.plan(wide, type="Q4_K_S", method="gptq", set=("blk.1.ffn_up=iq3_xxs",), out=tmp_path / "a.gguf")
    rules = ("blk.0.attn_q=q8_0", "blk.0.attn_k=iq4_nl", "blk.2.ffn_down=f16")
    report = quantize.run(wide, type="Q4_K_S", set=rules, out=tmp_path / "a.gguf", **FILE)
    held = stored(report.out)
    assert held["blk.0.attn_k.weight"].tensor_type == gguf.GGMLQuantizationType.IQ4_NL
    assert "blk.2.ffn_down.weight" not in report.errors
    assert report.errors["blk.0.attn_q.weight"] < 1e-3


# -- killed ------------------------------------------------------------------------------------------------------------


def resumed(run: Callable[[], object], out: Path, marks: list[bytes]) -> int:
    """Kills a run once its journal holds each mark in turn, and lets it end; returns how often it was killed."""
    journal, killed = partial_path(out) / JOURNAL, 0
    for mark in marks:
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)
                run()
            finally:
                os._exit(0)
        deadline = time.monotonic() + 90
        while not (journal.is_file() and mark in journal.read_bytes()):
            assert time.monotonic() < deadline
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        _, ended = os.waitpid(child, 0)
        killed += os.waitstatus_to_exitcode(ended) == -signal.SIGKILL
        if out.exists():
            return killed
    run()
    return killed


@pytest.mark.parametrize(
    "more",
    [
        {"method": "awq+gptq", "bits": 4},
        {"method": "gptq", "bits": 4, "dtype": "bf16", "set": ("*.0.mlp.up_proj=keep",)},
    ],
    ids=["awq+gptq", "cast"],
)
def test_a_folder_killed_after_each_block(tmp_path: Path, more: dict[str, Any]) -> None:
    """What is on disk is read back, so that the blocks to come see what they would have seen, on any threads."""
    options = FOLDER | more
    dtype = torch.float32 if "dtype" in more else torch.bfloat16  # the source may have more bits than the output
    model = tiny.llama(tmp_path / "Model", tokenizer=True, num_hidden_layers=3, dtype=dtype)
    whole, out = tmp_path / "whole" / "Out", tmp_path / "killed" / "Out"
    quantize.run(model, out=whole, **options | {"threads": 2})
    marks = [b'"model.layers.0"', b'"model.layers.1"']
    assert resumed(lambda: quantize.run(model, out=out, **options), out, marks) == 2
    assert tiny.contents(out) == tiny.contents(whole)
    assert [path.name for path in out.parent.iterdir()] == ["Out"]


def test_a_file_killed_after_each_block(wide: Path, tmp_path: Path) -> None:
    options = FILE | {"type": "Q4_K_S"}
    (tmp_path / "whole").mkdir()
    whole, out = tmp_path / "whole" / "a.gguf", tmp_path / "a.gguf"
    quantize.run(wide, out=whole, **options | {"threads": 2})
    marks = [b'"model.layers.0"', b'"model.layers.1"']
    assert resumed(lambda: quantize.run(wide, out=out, **options), out, marks) == 2
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "a.quantize.json", "whole"]
    assert (tmp_path / "a.quantize.json").read_bytes() == (tmp_path / "whole" / "a.quantize.json").read_bytes()


def test_a_file_of_experts_killed(tmp_path: Path) -> None:
    """Stacked in the file, stored one by one: read back to what the next block sees."""
    folder = gguf_models.save("mixtral", tmp_path / "Experts", num_hidden_layers=3, vocab_size=tiny.VOCAB)
    tiny.byte_tokenizer(folder)
    options = FILE | {"type": "Q4_0"}
    (tmp_path / "whole").mkdir()
    whole, out = tmp_path / "whole" / "a.gguf", tmp_path / "a.gguf"
    report = quantize.run(folder, out=whole, **options)
    assert {name for name in report.errors if "_exps" in name}
    assert resumed(lambda: quantize.run(folder, out=out, **options), out, [b'"model.layers.1"']) == 1
    assert out.read_bytes() == whole.read_bytes()


# -- experts and little text -------------------------------------------------------------------------------------------


def test_b19_an_expert_without_tokens_is_rounded_to_nearest_and_named(experts: Path, tmp_path: Path) -> None:
    report = quantize.run(experts, out=tmp_path / "Out", **FOLDER | {"bits": 4})
    unseen = [note for note in report.notes if "saw no calibration token" in note]
    assert {note.split(":")[0] for note in unseen} == {"model.layers.0", "model.layers.1"}
    assert all("experts.3." in note for note in unseen)
    nearest = quantize.run(
        experts, method="rtn", bits=4, group_size=32, format="gptq", symmetric=True, out=tmp_path / "Rtn", threads=1
    )
    ours, theirs = weights(report.out), weights(nearest.out)
    for name, value in ours.items():
        assert bool(value.isfinite().all()), name
        if name in report.errors:
            assert torch.equal(value, theirs[name]) == ("experts.3." in name), name
    with pytest.raises(UsageError, match="--strict"):
        quantize.run(experts, out=tmp_path / "Strict", **FOLDER | {"bits": 4, "strict": True})
    assert not (tmp_path / "Strict").exists()


def test_b19_all_experts_see_all_tokens_where_asked(experts: Path, tmp_path: Path) -> None:
    report = quantize.run(experts, out=tmp_path / "Out", **FOLDER | {"bits": 4, "all_experts": True})
    assert report.notes == ()


def test_b18_an_expert_without_tokens_in_a_file(experts: Path, tmp_path: Path) -> None:
    """The stack is made all the same, the others with feedback, and no NaN is in it."""
    report = quantize.run(experts, out=tmp_path / "a.gguf", **FILE | {"type": "Q4_0", "calib_samples": 4})
    assert [note for note in report.notes if "saw no calibration token" in note and "experts.3." in note]
    plain = quantize.run(experts, type="Q4_0", imatrix="none", out=tmp_path / "b.gguf", eval="none", threads=1)
    held, other = stored(report.out), stored(plain.out)
    name = "blk.0.ffn_up_exps.weight"
    same = [bool((a == b).all()) for a, b in zip(held[name].data, other[name].data, strict=True)]
    assert same == [False, False, False, True]
    assert all(bool(value.isfinite().all()) for value in weights(report.out).values())


def test_b21_too_little_text(model: Path, tmp_path: Path) -> None:
    """Fewer tokens than columns: the job ends, and says of which matrices."""
    few = FOLDER | {"method": "awq+gptq", "bits": 4, "calib_samples": 1, "calib_length": 100}
    report = quantize.run(model, out=tmp_path / "Few", **few)
    notes = [note for note in report.notes if "fewer tokens than columns" in note]
    assert len(notes) == 2
    assert all("mlp.down_proj" in note for note in notes)
    assert all(bool(value.isfinite().all()) for value in weights(report.out).values())


def test_b21_b25_dead_channels_and_zero_groups(tmp_path: Path) -> None:
    """Half of the groups of a matrix are zero or nearly, a norm silences channels, one channel drowns the others."""
    settings = tiny.llama_config()
    tensors = tiny.values(tiny.llama_shapes(settings), dtype=torch.float32)
    stem = "model.layers.0"
    tensors[f"{stem}.post_attention_layernorm.weight"][:20] = 0
    tensors[f"{stem}.input_layernorm.weight"][3] = 3e4
    tensors[f"{stem}.mlp.up_proj.weight"][:64, :32] = 0
    tensors[f"{stem}.mlp.up_proj.weight"][64:, :32] = 1e-8
    tensors[f"{stem}.mlp.gate_proj.weight"][5] = 0
    folder = tiny.write(tmp_path / "Model", settings, tensors, tokenizer=True)
    for method in ("gptq", "awq+gptq"):
        report = quantize.run(folder, out=tmp_path / method, **FOLDER | {"bits": 4, "method": method})
        held = weights(report.out)
        assert all(bool(value.isfinite().all()) for value in held.values())
        assert not held[f"{stem}.mlp.gate_proj.weight"][5].any()
        assert not [note for note in report.notes if "factorized" in note]


def test_b23_no_activation_at_whole_blocks(tmp_path: Path) -> None:
    """The first 256 inputs of every linear of a block never differ from zero: all k-quants stay finite and near."""
    settings = tiny.llama_config(**WIDE | {"hidden_size": 512, "num_hidden_layers": 2})
    tensors = tiny.values(tiny.llama_shapes(settings), dtype=torch.float32)
    for name, value in tensors.items():
        if name.endswith("norm.weight"):
            value[:256] = 0
    folder = tiny.write(tmp_path / "Model", settings, tensors, tokenizer=True)
    rules = tuple(
        f"blk.{i}.{leaf}={kind}"
        for i, leaf, kind in [
            (0, "attn_q", "q2_k"), (0, "attn_k", "q3_k"), (0, "attn_v", "q5_k"), (0, "ffn_up", "q6_k"),
            (1, "attn_q", "iq4_xs"), (1, "attn_k", "iq4_nl"), (1, "attn_v", "q8_0"), (1, "ffn_up", "q5_1"),
        ]
    )  # fmt: skip
    options = FILE | {"type": "Q4_K_S", "set": rules, "calib_samples": 6}
    report = quantize.run(folder, out=tmp_path / "a.gguf", **options)
    held = weights(report.out)
    assert all(bool(value.isfinite().all()) for value in held.values())
    for name, value in held.items():
        if "layers" in name and value.dim() > 1:
            assert share(tensors[name], value) < 0.3, name


def test_b27_hidden_states_beyond_half_precision(tmp_path: Path) -> None:
    """Down of the last block times 1e4: activations of 1e5 and more pass in float32, and the file holds numbers."""
    settings = tiny.llama_config(num_hidden_layers=3)
    tensors = tiny.values(tiny.llama_shapes(settings), dtype=torch.float32)
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e4
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e4
    folder = tiny.write(tmp_path / "Model", settings, tensors, tokenizer=True)
    report = quantize.run(folder, out=tmp_path / "Out", **FOLDER | {"bits": 4})
    assert all(bool(value.isfinite().all()) for value in weights(report.out).values())
    assert report.errors["model.layers.2.mlp.down_proj.weight"] < 0.05
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    folder = tiny.write(tmp_path / "Worse", settings, tensors, tokenizer=True)
    rules = ("model.layers.1.mlp.down_proj=keep",)
    with pytest.raises(InputError, match=r"model\.layers\.1 gives \d+ NaN or Inf among"):
        quantize.run(folder, out=tmp_path / "None", **FOLDER | {"bits": 4, "set": rules})
    assert not (tmp_path / "None").exists()


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "rtn", "--damping", "0.1"), "--damping has no meaning for method rtn"),
        (("--method", "awq", "--shrinkage", "0.1"), "--shrinkage has no meaning for method awq"),
        (("--method", "rtn", "--act-order", "none"), "--act-order has no meaning for method rtn"),
        (("--method", "awq", "--all-experts"), "--all-experts has no meaning for method awq"),
        (("--type", "Q8_0", "--damping", "0.1"), "--damping has no meaning for method rtn"),
        (("--method", "gptq", "--damping", "0"), "--damping"),
        (("--method", "gptq", "--act-order", "desc"), "--act-order"),
        (("--method", "awq+gptq", "--type", "Q4_K_M"), "awq+gptq cannot choose points of Q4_K_M"),
        (("--format", "hf", "--damping", "0.1"), "--damping says nothing without --method"),
        (("--format", "hf", "--all-experts"), "--all-experts says nothing without --method"),
        (("--method", "gptq", "--all-experts", "--statistics", "s.safetensors"), "--all-experts"),
    ],
)
def test_options_without_meaning_are_refused(
    model: Path, tmp_path: Path, cli: Cli, words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("run", model, *words, "--out", tmp_path / "Out")
    assert result.exit_code in (2, 3), result.stderr
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_options(cli: Cli) -> None:
    shown = cli("run", "--help").stdout
    for option in ("--damping", "--shrinkage", "--act-order", "--all-experts"):
        assert option in shown
    listed = cli("list").stdout
    assert "gptq" in listed
    assert "awq+gptq" in listed


def test_options_reach_the_method(tmp_path: Path) -> None:
    small = tiny.llama(tmp_path / "Small", tokenizer=True, num_hidden_layers=1)
    options = ({"act_order": kind} for kind in ("blocks", "columns", "none"))
    more = [*options, {"damping": 0.3}, {"shrinkage": 0.9}]
    found = [quantize.run(small, out=tmp_path / str(n), **FOLDER | {"bits": 4} | o).errors for n, o in enumerate(more)]
    assert len({tuple(errors.values()) for errors in found}) == len(more)
