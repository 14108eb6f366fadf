"""Each command on a tiny model: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize import formats, methods
from quantize.schemes import parse_scheme

Cli = Callable[..., Any]
Tiny = Callable[..., Path]
G32 = ("--bits", "4", "--group-size", "32")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of plain English, enough for a few short rows."""
    file = tmp_path / "text.txt"
    words = "The ferry left at noon, and nobody on the quay had seen who was steering it. "
    file.write_text("\n\n".join(words * (1 + number % 5) for number in range(60)), encoding="utf-8")
    return file


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and folder below `folder`."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in [folder, *sorted(folder.rglob("*"))]
    }


# run


def test_run_rtn(cli: Cli, tiny_llama: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "Out"
    result = cli("run", tiny_llama(), "--method", "rtn", *G32, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert str(out) in result.stdout
    assert "bits per weight" in result.stdout
    assert "quantize eval" in result.stdout  # how to measure what was not measured
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 32
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (tiny_llama() / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_run_names_the_output_in_the_current_folder(
    cli: Cli, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("run", tiny_llama(), "--method", "rtn", *G32).exit_code == 0
    assert (tmp_path / "Tiny-RTN-Int4" / "config.json").is_file()


def test_run_awq_with_a_text_file_and_no_evaluation(cli: Cli, tiny_llama: Tiny, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "Out"
    result = cli(
        "run", tiny_llama(), "--method", "awq", *G32, "--calib", text, "--calib-samples", 4, "--calib-length", 32,
        "--eval", "none", "--out", out, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["out"] == str(out)
    assert report["quality"] is None
    assert report["settings"]["calibration"] == "text.txt"
    assert report["figures"]["quantized"] == 14


def test_run_awq_measures_its_loss(cli: Cli, tiny_llama: Tiny, tmp_path: Path, text: Path) -> None:
    words = ("--calib", text, "--calib-samples", 4, "--calib-length", 32)
    result = cli("run", tiny_llama(), "--method", "awq", *G32, *words, "--eval", text, "--out", tmp_path / "Out")
    assert result.exit_code == 0, result.stderr
    for figure in ("perplexity", "base perplexity", "KL divergence", "same top token"):
        assert figure in result.stdout


def test_run_json_is_alone_on_stdout(cli: Cli, tiny_llama: Tiny, tmp_path: Path) -> None:
    result = cli("run", tiny_llama(), "--method", "rtn", *G32, "--out", tmp_path / "Out", "--json", "--w_bit", "4")
    report = json.loads(result.stdout)
    assert report["figures"]["bits_per_weight"] > 4
    assert "note: --w_bit is spelt --bits here" in result.stderr


def test_a_rule_decides(cli: Cli, tiny_llama: Tiny, tmp_path: Path) -> None:
    rule = "model.layers.0.*=keep"
    result = cli("run", tiny_llama(), "--method", "rtn", *G32, "--set", rule, "--out", tmp_path / "Out", "--json")
    assert json.loads(result.stdout)["figures"]["quantized"] == 7


# plan and --dry-run


@pytest.mark.parametrize("words", [("run", "--dry-run"), ("plan",)])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_touches_nothing(
    cli: Cli, tiny_copy: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], as_json: bool
) -> None:
    model = tiny_copy()
    monkeypatch.chdir(tmp_path)
    before = state(tmp_path)
    result = cli(*words, model, "--method", "awq", *(["--json"] if as_json else []))
    assert result.exit_code == 0, result.stderr
    assert state(tmp_path) == before
    if as_json:
        plan = json.loads(result.stdout)
        assert len(plan["tensors"]) == 21
        assert plan["peak_bytes"] > 0
        assert plan["free_bytes"] > 0
        assert plan["refusal"] is None
    else:
        assert "model.layers.*.mlp.down_proj.weight" in result.stdout
        assert "group size 64 for the whole file: 128 does not divide" in result.stdout
        for figure in ("size", "bits per weight", "peak memory", "free disk", "fallbacks"):
            assert figure in result.stdout


def test_a_dry_run_of_convert_touches_nothing(
    cli: Cli, tiny_copy: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_copy()
    monkeypatch.chdir(tmp_path)
    before = state(tmp_path)
    assert cli("convert", model, "--to", "hf", "--dry-run").exit_code == 0
    assert state(tmp_path) == before


def test_a_plan_shows_fallbacks_with_reasons(cli: Cli, tiny_llama: Tiny) -> None:
    odd = tiny_llama(intermediate_size=72)
    result = cli("plan", odd, "--method", "rtn", *G32)
    assert result.exit_code == 0, result.stderr
    assert "72 is no multiple" in result.stdout
    assert cli("plan", odd, "--method", "rtn", *G32, "--no-fallback").exit_code == 2


def test_a_plan_shows_what_is_dropped(cli: Cli, tiny_copy: Tiny) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = tiny_copy()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = cli("plan", model, "--method", "rtn", *G32)
    assert "model.layers.*.self_attn.rotary_emb.inv_freq" in result.stdout
    assert "a buffer that engines compute" in result.stdout


def test_a_plan_ends_as_the_run_would_be_refused(cli: Cli, tiny_llama: Tiny, tmp_path: Path) -> None:
    (tmp_path / "Out").mkdir()
    result = cli("plan", tiny_llama(), "--method", "rtn", *G32, "--out", tmp_path / "Out")
    assert result.exit_code == 2
    assert "peak memory" in result.stdout
    assert "exists already" in result.stderr


# convert


def test_convert_takes_an_awq_model_back(cli: Cli, tiny_llama: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert cli("run", tiny_llama(), "--method", "rtn", *G32, "--out", tmp_path / "Q").exit_code == 0
    result = cli("convert", tmp_path / "Q", "--to", "hf", "--out", tmp_path / "Back")
    assert result.exit_code == 0, result.stderr
    back = load_file(tmp_path / "Back" / "model.safetensors")
    whole = load_file(tiny_llama() / "model.safetensors")
    assert back.keys() == whole.keys()
    assert "quantization_config" not in json.loads((tmp_path / "Back" / "config.json").read_text())


def test_convert_copies_plain_tensors_bit_for_bit(cli: Cli, tiny_llama: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = cli("convert", tiny_llama(), "--format", "hf", "--out", tmp_path / "Copy", "--json")
    assert json.loads(result.stdout)["method"] is None
    whole, copy = (load_file(path / "model.safetensors") for path in (tiny_llama(), tmp_path / "Copy"))
    assert all(whole[name].equal(copy[name]) for name in whole)


def test_convert_to_a_quantized_format_asks_how(cli: Cli, tiny_llama: Tiny) -> None:
    result = cli("convert", tiny_llama(), "--to", "awq")
    assert result.exit_code == 2
    assert "--method" in result.stderr


# eval


EVAL = ("--context", "32", "--chunks", "4")


def test_eval_alone(cli: Cli, tiny_llama: Tiny, text: Path) -> None:
    result = cli("eval", tiny_llama(), "--text", text, *EVAL)
    assert result.exit_code == 0, result.stderr
    assert "perplexity" in result.stdout
    assert "KL" not in result.stdout
    assert "llamacpp: windows of 32" in result.stdout


def test_eval_against_a_base(cli: Cli, tiny_llama: Tiny, text: Path) -> None:
    other = tiny_llama(initializer_range=0.21)
    result = cli("eval", other, "--base", tiny_llama(), "--text", text, *EVAL)
    assert result.exit_code == 0, result.stderr
    for figure in ("base perplexity", "ln difference", "KL divergence", "p99.9", "same top token", "protocol"):
        assert figure in result.stdout


@pytest.mark.parametrize("chunks", [1, 4])
def test_eval_json_parses(cli: Cli, tiny_llama: Tiny, text: Path, chunks: int) -> None:
    words = ("--text", text, "--context", 32, "--chunks", chunks, "--protocol", "gptq", "--json")
    result = cli("eval", tiny_llama(), "--base", tiny_llama(), *words)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    value = json.loads(result.stdout, parse_constant=refuse)
    assert value["perplexity"] == pytest.approx(value["base"]["perplexity"])
    assert value["kl_divergence"]["mean"] == pytest.approx(0, abs=1e-6)
    assert value["protocol"]["name"] == "gptq"
    assert (value["kl_divergence"]["low"] is None) == (chunks == 1)


@pytest.mark.parametrize(
    ("limit", "code", "reason"),
    [
        (("--max-kld", "0.000001"), 5, "KL divergence"),
        (("--max-kld", "100"), 0, ""),
        (("--min-top1", "99.9%"), 5, "top-1 agreement"),
        (("--min-top1", "0%"), 0, ""),
        (("--max-ppl-increase", "100000%"), 0, ""),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_the_gate(
    cli: Cli, tiny_llama: Tiny, text: Path, limit: tuple[str, str], code: int, reason: str, as_json: bool
) -> None:
    other = tiny_llama(initializer_range=0.21)
    words = ("--base", tiny_llama(), "--text", text, *EVAL, *limit, *(["--json"] if as_json else []))
    result = cli("eval", other, *words)
    assert result.exit_code == code, result.stderr
    assert "perplexity" in result.stdout
    if as_json:
        json.loads(result.stdout)
    assert reason in result.stderr
    assert result.stderr.count("error:") == (1 if code else 0)


def test_the_gate_on_perplexity(cli: Cli, tiny_llama: Tiny, text: Path) -> None:
    # a model of other weights is worse than a confident one in one of the two directions
    pair = (tiny_llama(), tiny_llama(initializer_range=0.3))
    codes = set()
    for model, base in (pair, pair[::-1]):
        result = cli("eval", model, "--base", base, "--text", text, *EVAL, "--max-ppl-increase", "0")
        codes.add(result.exit_code)
        if result.exit_code:
            assert "% above the base's" in result.stderr
    assert codes == {0, 5}


def test_an_unknown_protocol_names_the_nearest(cli: Cli, tiny_llama: Tiny, text: Path) -> None:
    result = cli("eval", tiny_llama(), "--text", text, "--protocol", "llamcpp")
    assert result.exit_code == 2
    assert "did you mean 'llamacpp'?" in result.stderr


# inspect


def test_inspect(cli: Cli, tiny_llama: Tiny, tmp_path: Path) -> None:
    assert cli("run", tiny_llama(), "--method", "rtn", *G32, "--out", tmp_path / "Q").exit_code == 0
    result = cli("inspect", tmp_path / "Q")
    assert result.exit_code == 0, result.stderr
    for word in ("awq", "LlamaForCausalLM", "int4-g32", "bf16", "tokenizer.json"):
        assert word in result.stdout
    value = json.loads(cli("inspect", tmp_path / "Q", "--json").stdout)
    assert value["schemes"]["int4-g32"]["tensors"] == 14
    assert len(value["each"]) == value["tensors"] == 21


def test_inspect_of_a_gguf_needs_no_tokenizer(cli: Cli, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    file = tmp_path / "model.gguf"
    tiny_gguf(GGUFWriter(file, "llama"))
    result = cli("inspect", file)
    assert result.exit_code == 0, result.stderr
    assert "gguf" in result.stdout
    assert "general.architecture" in result.stdout
    assert json.loads(cli("inspect", file, "--json").stdout)["metadata"]["llama.block_count"] == 1


def tiny_gguf(writer: Any) -> None:
    """Writes a one-layer llama without any tokenizer."""
    import numpy as np

    hidden, ffn, vocab = 32, 64, 16
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    shapes = {"token_embd": (vocab, hidden), "output_norm": (hidden,), "output": (vocab, hidden)}
    shapes |= {f"blk.0.attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,), "blk.0.ffn_down": (hidden, ffn)}
    shapes |= {"blk.0.ffn_gate": (ffn, hidden), "blk.0.ffn_up": (ffn, hidden)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# list


def test_list_agrees_with_the_registries(cli: Cli) -> None:
    value = json.loads(cli("list", "--json").stdout)
    assert {row["name"] for row in value["methods"]} == set(methods.table())
    assert {row["name"] for row in value["formats"]} == set(formats.table())
    for row in value["combinations"]:
        for name in row["schemes"]:
            scheme = parse_scheme(name)
            assert methods.named(row["method"]).reject(scheme) is None
            assert formats.named(row["format"]).reject(scheme) is None
    shown = cli("list").stdout
    for row in (*value["methods"], *value["formats"]):
        assert row["name"] in shown
        assert row["summary"] in shown


def test_list_spells_schemes_that_parse(cli: Cli) -> None:
    for row in json.loads(cli("list", "--json").stdout)["schemes"]:
        assert row["meaning"]
        for name in row["spelling"].split(", "):
            assert name == "keep" or str(parse_scheme(name)) == name
