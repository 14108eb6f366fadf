"""Plans: which tensor gets which scheme, what stands in where a shape forbids it, and what is refused at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import quantize
from quantize.errors import InputError, ResourceError, UsageError
from quantize.formats import container, folder
from quantize.formats.base import Piece
from quantize.planning import Entry, Plan, describe, require_space
from quantize.schemes import Plain

BF16 = torch.bfloat16


def plan(model: Path, **options: Any) -> Plan:
    return quantize.plan(model, **({"method": "rtn", "group_size": 32, "out": model.parent / "Out"} | options))


def by_name(found: Plan) -> Mapping[str, Entry]:
    return {entry.name.removeprefix("model.layers."): entry for entry in found.entries}


def schemes(found: Plan) -> dict[str, str]:
    return {name: str(entry.scheme) for name, entry in by_name(found).items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "model")


def qwen3_moe(path: Path, experts: int = 4) -> Path:
    config = tiny.llama_config(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", head_dim=16, num_experts=experts,
        num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    shapes = {name: shape for name, shape in tiny.llama_shapes(config).items() if ".mlp." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{norm}.weight": (16,) for norm in ("q_norm", "k_norm")}
        shapes[f"{stem}.mlp.gate.weight"] = (experts, 64)
        for expert in range(experts):
            shapes |= {f"{stem}.mlp.experts.{expert}.{leaf}.weight": (32, 64) for leaf in ("gate_proj", "up_proj")}
            shapes[f"{stem}.mlp.experts.{expert}.down_proj.weight"] = (64, 32)
    return tiny.write(path, config, tiny.values(shapes))


# ------------------------------------------------------------------------------------------------------------
# The plain case


def test_every_tensor_has_a_rule(model: Path) -> None:
    found = plan(model)
    rules = {
        name: (str(entry.scheme), entry.rule) for name, entry in by_name(found).items() if not name.startswith("1")
    }
    linear = ("int4-g32", "linear of a block")
    norm = ("bf16", "copied: norm, bias or other vector")
    assert rules == {
        "model.embed_tokens.weight": ("bf16", "copied: embedding"),
        **{f"0.self_attn.{leaf}_proj.weight": linear for leaf in "qkvo"},
        **{f"0.mlp.{leaf}_proj.weight": linear for leaf in ("gate", "up", "down")},
        **{f"0.{leaf}_layernorm.weight": norm for leaf in ("input", "post_attention")},
        "model.norm.weight": ("bf16", "copied: outside the blocks"),
        "lm_head.weight": ("bf16", "copied: head"),
    }
    assert len(found.entries) == 21
    assert len(found.quantized) == 14
    assert found.fallbacks == ()
    assert found.notices == ()
    assert found.refusal is None
    assert found.source == model


def test_a_plan_reads_no_tensor_and_touches_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (container, folder):
        monkeypatch.setattr(module, "read_rows", lambda *_: pytest.fail("a tensor was read"))
    before = {file: file.stat() for file in tmp_path.rglob("*")}
    plan(model)
    plan(model, method="awq", out=tmp_path / "deep" / "Out")
    after = {file: file.stat() for file in tmp_path.rglob("*")}
    assert after.keys() == before.keys()
    assert all(after[file].st_mtime_ns == before[file].st_mtime_ns for file in before)


@pytest.mark.parametrize("options", [{}, {"dtype": "f32"}, {"set": ("*.down_proj=keep", "lm_head=f16")}])
def test_planned_sizes_are_the_files_sizes(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    found = plan(model, **options)
    quantize.run(model, method="rtn", group_size=32, out=tmp_path / "Out", **options)
    content = (tmp_path / "Out" / "model.safetensors").read_bytes()
    (pieces,) = found.files.values()
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + found.output_bytes
    assert found.output_bytes == sum(piece.nbytes for piece in pieces)
    stored, _ = container.read_header(tmp_path / "Out" / "model.safetensors")
    assert {piece.name: (piece.dtype, piece.shape, piece.nbytes) for piece in pieces} == {
        name: (extent.dtype, extent.shape, extent.nbytes) for name, extent in stored.items()
    }
    weights = sum(entry.count for entry in found.entries)
    assert found.bits_per_weight == pytest.approx(found.output_bytes * 8 / weights)
    linears = [info for info in quantize.open(tmp_path / "Out").tensors.values() if str(info.scheme) == "int4-g32"]
    bits = 8 * sum(info.nbytes for info in linears) / sum(torch.Size(info.shape).numel() for info in linears)
    assert found.linear_bits_per_weight == pytest.approx(bits)


def test_the_description_is_plain_values(model: Path) -> None:
    found = plan(model, set=("*.down_proj=keep",))
    value = describe(found)
    assert json.loads(json.dumps(value)) == value
    assert value["tensors"][1]["to"] in ("int4-g32", "bf16")
    assert [row["name"] for row in value["tensors"]] == [entry.name for entry in found.entries]
    assert value["output_bytes"] == found.output_bytes


# ------------------------------------------------------------------------------------------------------------
# Shapes that do not fit


@pytest.mark.parametrize(
    ("hidden", "ffn", "asked", "group", "kept"),
    [
        (128, 256, 128, 128, 0),
        (64, 128, 128, 64, 0),
        (64, 192, 64, 64, 0),
        (192, 96, 128, 32, 0),
        (64, 96, 64, 32, 0),
        (64, 72, 128, 64, 2),  # 72 fits no group: it is kept, and does not lower that of the others
        (64, 72, 16, 16, 2),
        (64, 48, 16, 16, 0),
        (64, 48, 32, 32, 2),
        (64, 200, -1, -1, 0),
    ],
)
def test_group_sizes(tmp_path: Path, hidden: int, ffn: int, asked: int, group: int, kept: int) -> None:
    model = tiny.llama(tmp_path / "model", hidden_size=hidden, intermediate_size=ffn)
    found = plan(model, group_size=asked)
    spelling = "int4-row" if group == -1 else f"int4-g{group}"
    assert {str(entry.scheme) for entry in found.quantized} == {spelling}
    assert [entry.name[15:] for entry in found.fallbacks] == ["mlp.down_proj.weight"] * kept
    for entry in found.fallbacks:
        assert entry.rule == f"kept: its width {ffn} is no multiple of the group size {group}"
        assert entry.scheme == Plain(BF16)
    lowered = [notice for notice in found.notices if notice.startswith("group size")]
    assert len(lowered) == (asked != group)
    if lowered:
        assert f"group size {group} for the whole file: {asked} does not divide the width" in lowered[0]


@pytest.mark.parametrize(
    ("hidden", "ffn", "asked", "hint"),
    [(64, 128, 128, "say --group-size 64"), (64, 72, 64, "keep it by a rule"), (64, 72, 128, "say --group-size 64")],
)
def test_no_fallback_refuses(tmp_path: Path, hidden: int, ffn: int, asked: int, hint: str) -> None:
    model = tiny.llama(tmp_path / "model", hidden_size=hidden, intermediate_size=ffn)
    for option in ({"fallback": False}, {"strict": True}):
        with pytest.raises(UsageError, match=f"group size {asked} does not divide the width") as caught:
            plan(model, group_size=asked, **option)
        assert hint in caught.value.hint
    rules = ("*.down_proj=keep",) if ffn == 72 else ()
    assert plan(model, group_size=32, fallback=False, set=rules).fallbacks == ()


def test_heights_that_do_not_fit(tmp_path: Path) -> None:
    """Eight outputs share a word: a projection of 60 outputs is kept, the rest of its block is not."""
    model = tiny.llama(tmp_path / "model", intermediate_size=60)
    found = plan(model)
    assert {entry.name[15:] for entry in found.fallbacks} == {
        f"mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")
    }
    rules = {entry.name[15:]: entry.rule for entry in found.fallbacks}
    assert rules["mlp.up_proj.weight"] == "kept: its height 60 is no multiple of 8"
    assert len(found.quantized) == 8
    with pytest.raises(UsageError, match=r"gate_proj\.weight cannot be int4-row: its height 60 is no multiple of 8"):
        plan(model, fallback=False, group_size=-1)


def test_a_model_of_which_nothing_fits(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model", hidden_size=24, intermediate_size=24, num_attention_heads=2)
    with pytest.raises(InputError, match="no tensor of this model can be quantized"):
        plan(model, group_size=64)


def test_convolutions_and_other_shapes_are_copied(tmp_path: Path) -> None:
    extra = {
        "vision_tower.patch_embed.proj.weight": torch.ones(8, 3, 14, 14, dtype=torch.float16),
        "visual.blocks.0.attn.qkv.weight": torch.ones(8, 64, dtype=BF16),
        "multi_modal_projector.linear_1.weight": torch.ones(64, 8, dtype=BF16),
        "model.visual.scale": torch.tensor(2.0),
    }
    found = by_name(plan(tiny.llama(tmp_path / "model", extra=extra), set=("*=int4-g32",)))
    for name in extra:
        assert not found[name].quantized
        assert found[name].scheme == found[name].source


# ------------------------------------------------------------------------------------------------------------
# Rules


def test_the_first_rule_wins_and_the_rest_follows(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules:\n- {match: '*.0.*', scheme: f16}\n- {match: 're:.*[qk]_proj', scheme: int4-g32-sym}\n")
    found = schemes(plan(model, recipe=recipe, set=("*.v_proj=keep", "model.norm=f32")))
    assert found["0.self_attn.v_proj.weight"] == found["1.self_attn.v_proj.weight"] == "bf16"
    assert found["0.self_attn.q_proj.weight"] == found["0.input_layernorm.weight"] == "f16"
    assert found["1.self_attn.q_proj.weight"] == found["1.self_attn.k_proj.weight"] == "int4-g32-sym"
    assert found["1.self_attn.o_proj.weight"] == "int4-g32"
    assert found["model.norm.weight"] == "f32"
    entry = by_name(plan(model, set=("*.v_proj=keep",)))["0.self_attn.v_proj.weight"]
    assert entry.rule == "--set: *.v_proj"


@pytest.mark.parametrize("pattern", ["model.layers.7.*", "re:.*nothing", "Model.norm", "q_proj"])
def test_a_pattern_that_matches_nothing(model: Path, pattern: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(model, set=("*.q_proj=keep", f"{pattern}=keep"))
    assert caught.value.message == f"--set: pattern '{pattern}' matches no tensor"
    assert "model.layers.0" in caught.value.hint


def test_a_pattern_that_another_rule_shadows_has_matched(model: Path) -> None:
    plan(model, set=("*=int4-g32", "*.q_proj=keep"))


def test_two_group_sizes_in_one_file(model: Path) -> None:
    with pytest.raises(UsageError, match=r"one group size for the whole file, not \[16, 32\]") as caught:
        plan(model, set=("*.down_proj=int4-g16",))
    assert caught.value.hint == "give all rules the same group size"
    with pytest.raises(UsageError, match="one group size"):  # after the group was lowered from 128
        plan(model, group_size=128, set=("*.down_proj=int4-g128",))
    plan(model, group_size=128, set=("*.down_proj=int4-g64",))


def test_schemes_that_the_format_or_the_method_cannot_do(model: Path) -> None:
    for scheme, said in (("int8-g32", "AWQ holds 4-bit integers only"), ("q4_0", "AWQ holds 4-bit")):
        with pytest.raises(UsageError, match=f"cannot be {scheme}: {said}"):
            plan(model, set=(f"*.down_proj={scheme}",))


def test_embedding_head_and_norms_are_no_linears_of_a_block(model: Path) -> None:
    for name in ("lm_head", "model.embed_tokens", "model.layers.0.input_layernorm"):
        with pytest.raises(UsageError, match=f"{name}.weight is no linear of a block"):
            plan(model, set=(f"{name}=int4-g32",))
    found = plan(model, set=("*=int4-g32",))
    assert len(found.quantized) == 14
    assert found.fallbacks == ()
    entry = by_name(found)["lm_head.weight"]
    assert (entry.scheme, entry.rule) == (Plain(BF16), "--set: * asks for more, but it is no linear of a block")


@pytest.mark.parametrize("scheme", ["i32", "u8", "bool", "f8_e4m3", "f8_e5m2", "c64"])
def test_plain_types_that_cannot_hold_weights(model: Path, scheme: str) -> None:
    with pytest.raises(UsageError, match=f"{scheme} cannot hold weights"):
        plan(model, set=(f"*.down_proj={scheme}",))
    with pytest.raises(UsageError, match=f"--dtype {scheme} is no floating type"):
        plan(model, dtype=scheme)


def test_casts_leave_whole_numbers_alone(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model", extra={"mtp.table": torch.arange(4), "mtp.scale": torch.ones(2, dtype=BF16)})
    found = schemes(plan(model, dtype="f32"))
    assert (found["mtp.table"], found["mtp.scale"], found["model.norm.weight"]) == ("i64", "f32", "f32")
    found = schemes(plan(model, set=("mtp.*=f16",)))
    assert (found["mtp.table"], found["mtp.scale"]) == ("i64", "f16")


# ------------------------------------------------------------------------------------------------------------
# Tensors beyond the language model


HELPERS: dict[str, Tensor] = {
    "lm_head.weight._scale": torch.ones(1),
    "model.layers.0.mlp.up_proj.packed": torch.ones(4, dtype=torch.uint8),
    "something": torch.ones(2, 64, dtype=BF16),
}


@pytest.mark.parametrize("name", HELPERS)
@pytest.mark.parametrize(
    "options", [{}, {"set": ("*=int4-g32",)}, {"method": None, "format": "hf", "group_size": None}]
)
def test_unknown_tensors_are_an_error_and_the_hint_solves_it(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    model = tiny.llama(tmp_path / "model", extra={name: HELPERS[name]})
    with pytest.raises(InputError, match="belongs to no module and no rule") as caught:
        plan(model, **options)
    assert f"'{name}'" in caught.value.message
    assert f"--set '{name}=keep'" in caught.value.hint
    rules = (f"{name}=keep", *options.get("set", ()))
    entry = by_name(plan(model, **(options | {"set": rules})))[name.removeprefix("model.layers.")]
    assert entry.scheme == Plain(HELPERS[name].dtype)
    assert entry.rule == f"--set: {name}"


def test_heads_for_more_tokens_are_copied_and_counted(tmp_path: Path) -> None:
    extra = {
        "model.layers.2.eh_proj.weight": torch.ones(64, 128, dtype=BF16),
        "model.layers.2.self_attn.q_proj.weight": torch.ones(64, 64, dtype=BF16),
        "mtp.layers.0.mlp.up_proj.weight": torch.ones(128, 64, dtype=BF16),
    }
    model = tiny.llama(tmp_path / "model", extra=extra)
    found = plan(model)
    assert len(found.entries) == 24
    assert len(found.quantized) == 14
    for name in extra:
        entry = by_name(found)[name.removeprefix("model.layers.")]
        assert entry.rule == "copied: not part of the language model in transformers"
    report = quantize.run(model, method="rtn", group_size=32, out=tmp_path / "Out")
    assert report.figures["tensors"] == 24
    written = quantize.open(tmp_path / "Out")
    assert all(torch.equal(written.read(name), value) for name, value in extra.items())


def test_routers_stay_and_engines_are_told(tmp_path: Path) -> None:
    model = qwen3_moe(tmp_path / "model")
    found = plan(model)
    routers = {name: entry for name, entry in by_name(found).items() if entry.rule == "copied: router"}
    assert set(routers) == {"0.mlp.gate.weight", "1.mlp.gate.weight"}
    assert len(found.quantized) == 2 * (4 + 4 * 3)
    report = quantize.run(model, method="rtn", group_size=32, out=tmp_path / "Out")
    config = json.loads((tmp_path / "Out" / "config.json").read_text())
    kept = config["quantization_config"]["modules_to_not_convert"]
    assert kept == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert report.figures["quantized"] == 32


def test_names_of_modules_are_aliases(tmp_path: Path) -> None:
    """transformers stacks experts: the stored matrices answer to the stack's name as well."""
    model = qwen3_moe(tmp_path / "model")
    found = plan(model, set=("model.layers.0.mlp.experts=keep",))
    kept = {name for name, entry in by_name(found).items() if entry.rule.startswith("--set")}
    assert len(kept) == 12
    assert all(name.startswith("0.mlp.experts.") for name in kept)


def test_towers_are_named_to_engines(tmp_path: Path) -> None:
    extra = {
        "visual.blocks.0.attn.qkv.weight": torch.ones(8, 64, dtype=BF16),
        "visual.patch_embed.proj.weight": torch.ones(8, 3, 2, 2, dtype=BF16),
        "visual.norm.weight": torch.ones(8, dtype=BF16),
    }
    model = tiny.llama(tmp_path / "model", extra=extra)
    quantize.run(model, method="rtn", group_size=32, out=tmp_path / "Out", set=("*.0.*.down_proj=keep",))
    block = json.loads((tmp_path / "Out" / "config.json").read_text())["quantization_config"]
    assert block["modules_to_not_convert"] == ["model.layers.0.mlp.down_proj", "visual.blocks.0.attn.qkv"]


def test_dropped_buffers_are_in_the_plan(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model = tiny.llama(tmp_path / "model", extra={name: torch.ones(8)})
    found = plan(model)
    assert found.dropped == {name: "a buffer that engines compute"}
    assert name not in {entry.name for entry in found.entries}
    report = quantize.run(model, method="rtn", group_size=32, out=tmp_path / "Out")
    assert report.figures["dropped"] == 1


# ------------------------------------------------------------------------------------------------------------
# Files, notices, resources


def test_shards(model: Path, tmp_path: Path) -> None:
    found = plan(model, split_size=50_000)
    count = len(found.files)
    assert count > 2
    assert list(found.files) == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    sizes = [sum(piece.nbytes for piece in pieces) for pieces in found.files.values()]
    assert all(size <= 50_000 or len(pieces) <= 3 for size, pieces in zip(sizes, found.files.values(), strict=True))
    order = [piece.name for pieces in found.files.values() for piece in pieces]
    assert order == [piece.name for piece in next(iter(plan(model).files.values()))]
    whole = quantize.run(model, method="rtn", group_size=32, out=tmp_path / "whole" / "Out")
    quantize.run(model, method="rtn", group_size=32, split_size=50_000, out=tmp_path / "Out")
    one, many = quantize.open(whole.out), quantize.open(tmp_path / "Out")
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)
    index = json.loads((tmp_path / "Out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert sorted(index["weight_map"]) == sorted(order)


def test_parts_of_a_tensor_share_a_shard(model: Path) -> None:
    files = plan(model, split_size=1).files
    assert len(files) == 21
    for pieces in files.values():
        assert len({piece.name.rpartition(".")[0] for piece in pieces}) == 1


def test_half_quantized_fused_linears_are_noticed(model: Path) -> None:
    (notice,) = plan(model, set=("*.0.*.q_proj=keep",)).notices
    assert "vLLM fuses" in notice
    assert "model.layers.0.self_attn.k_proj.weight" in notice
    assert plan(model, set=("*.0.*.[qkv]_proj=keep",)).notices == ()


def test_space(model: Path) -> None:
    found = plan(model)
    require_space(found)
    short = replace(found, free_bytes=found.output_bytes - 1)
    with pytest.raises(ResourceError, match="are free"):
        require_space(short)
    require_space(short, already=1)


def test_the_memory_estimate_knows_method_and_text(model: Path) -> None:
    rtn, awq = plan(model).peak_bytes, plan(model, method="awq", calib_samples=4, calib_length=64).peak_bytes
    assert 0 < rtn < awq
    assert awq < plan(model, method="awq", calib_samples=4096, calib_length=512).peak_bytes


def test_the_memory_estimate_counts_experts(tmp_path: Path) -> None:
    """Each expert has inputs of its own, and experts stored one by one are stacked on their way into the model."""
    made = {count: qwen3_moe(tmp_path / str(count), count) for count in (4, 8)}
    few, many = (plan(path, method="awq", threads=1).peak_bytes for path in made.values())
    hessians, weights = 4 * (64**2 + 32**2), 4 * 3 * 64 * 32
    routing = 2 * 4 * 64
    assert many - few == pytest.approx(4 * (2 * hessians + weights * 8 / 3 + routing), abs=8)


def test_sizes_of_pieces() -> None:
    assert Piece("x", torch.int32, (3, 5)).nbytes == 60
    assert Piece("x", torch.float64, ()).nbytes == 8
    assert Piece("x", torch.bool, (0, 5)).nbytes == 0
