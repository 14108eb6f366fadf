"""Tiny models of every architecture to GGUF and back, and what the writer is told of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures as towers
import gguf
import gguf_models
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.folder import FolderCheckpoint
from quantize.formats.gguf import GGUFCheckpoint
from quantize.formats.gguf.architectures import ARCHITECTURES, names
from quantize.formats.gguf.architectures.lazy import Leaf, Reshaped, Rows, Transposed
from quantize.formats.gguf.general import size_label
from quantize.formats.gguf.view import GGUFView
from quantize.schemes import GGMLBlock, Plain

HALVES = {Type.F16: torch.float16, Type.BF16: torch.bfloat16, Type.F32: torch.float32}
# Values that a function changes; all others move.
_CHANGED = ("norm", "A_log")


def view_of(name: str, folder: Path, **changes: Any) -> GGUFView:
    return GGUFView(FolderCheckpoint(gguf_models.save(name, folder, **changes)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products of this size take longer on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- there and back


@pytest.mark.parametrize("name", gguf_models.MODELS)
def test_back_to_the_same_model(name: str, tmp_path: Path) -> None:
    import transformers

    model = gguf_models.load(name, gguf_models.save(name, tmp_path / "model"))
    source = FolderCheckpoint(tmp_path / "model")
    view = GGUFView(source)
    back = GGUFCheckpoint(gguf_models.write_gguf(view, tmp_path / "m.gguf", Type.F32))
    assert view.required_float("token_embd.weight") is False
    dropped = [n for n, why in view.dropped.items() if "pooler" in n or "embedding" in why or "head" in why]
    kept = {n: source.read(n) for n in source.tensors if n not in dropped}
    if name in ("qwen2moe", "gpt-oss"):
        assert "lm_head.weight" in back.tensors
    assert back.tensors.keys() == kept.keys()
    for key, values in kept.items():
        read = back.read(key).to(values.dtype)
        assert read.shape == values.shape, key
        if any(word in key for word in _CHANGED):
            assert torch.allclose(read, values, rtol=1e-6, atol=1e-6), key
        else:
            assert torch.equal(read, values), key
    tiny.write(tmp_path / "back", back.config, {n: back.read(n).contiguous() for n in back.tensors})
    again = getattr(transformers, back.config["architectures"][0]).from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(model) or name == "mistral"
    ids = torch.arange(3, 15)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        before, after = (m(input_ids=ids, use_cache=False, **more)[0] for m in (model, again))
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama", "llama-mha", "llama-mqa"])
def test_llama_comes_back_bit_for_bit(name: str, kind: Type, tmp_path: Path) -> None:
    source = FolderCheckpoint(gguf_models.save(name, tmp_path / "model", HALVES[kind]))
    view = GGUFView(source)
    back = GGUFCheckpoint(gguf_models.write_gguf(view, tmp_path / "m.gguf", kind))
    assert back.tensors.keys() == source.tensors.keys()
    for key in source.tensors:
        assert torch.equal(back.read(key).to(HALVES[kind]), source.read(key)), key
    heads = back.config["num_key_value_heads"]
    key = view.read("blk.1.attn_k.weight")
    stored = source.read("model.layers.1.self_attn.k_proj.weight")
    assert torch.equal(key.reshape(heads, 16, 2, -1).transpose(1, 2), stored.reshape(heads, 2, 16, -1))


def test_every_architecture_has_a_model() -> None:
    made = {gguf_models.MODELS[name][0] for name in gguf_models.MODELS}
    assert {architecture.model_class for architecture in ARCHITECTURES} <= made
    assert len(names()) == len(set(names()))


# --- reading


class Counting:
    """A checkpoint that counts the values read."""

    def __init__(self, base: FolderCheckpoint) -> None:
        self.base, self.count = base, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        values = self.base.read(name, start, stop)
        self.count += values.numel()
        return values


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "falcon40", "deepseek-v3", "gpt-oss", "qwen35moe", "t5"])
def test_rows_are_read_as_far_as_wanted(name: str, tmp_path: Path) -> None:
    source = Counting(FolderCheckpoint(gguf_models.save(name, tmp_path)))
    view = GGUFView(source)  # type: ignore[arg-type]  # it passes on all else
    assert source.count == 0
    for key, info in view.tensors.items():
        whole = view.read(key)
        assert (tuple(whole.shape), Plain(whole.dtype)) == (info.shape, info.scheme)
        assert info.nbytes == whole.nbytes
        rows = info.shape[0]
        for start, stop in [(0, 1), (rows // 3, rows // 2 + 1), (rows // 2, 999), (rows - 1, None)]:
            assert torch.equal(view.read(key, start, stop), whole[start:stop]), key


def test_little_more_is_read_than_wanted(tmp_path: Path) -> None:
    source = Counting(FolderCheckpoint(gguf_models.save("mixtral", tmp_path, num_attention_heads=16)))
    view = GGUFView(source)  # type: ignore[arg-type]
    for key, start, stop, most in [
        ("blk.0.attn_q.weight", 32, 64, 32 * 64),  # a head
        ("blk.0.attn_q.weight", 0, 1, 64),
        ("blk.0.ffn_gate_exps.weight", 2, 3, 96 * 64),  # an expert
        ("token_embd.weight", 10, 11, 64),
    ]:
        source.count = 0
        view.read(key, start, stop)
        assert source.count == most, key


def test_names_of_sources(tmp_path: Path) -> None:
    view = view_of("mixtral", tmp_path)
    experts = [f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight" for e in range(4)]
    assert view.sources("blk.1.ffn_gate_exps.weight") == tuple(experts)
    assert all(view.same_columns(name) for name in view.tensors)
    assert view.tensors["blk.1.ffn_down_exps.weight"].shape == (4, 64, 96)
    floats = {name.removeprefix("blk.0.") for name in view.tensors if view.required_float(name)}
    assert {name for name in floats if "blk" not in name} == {
        "output_norm.weight",
        "attn_norm.weight",
        "ffn_norm.weight",
        "ffn_gate_inp.weight",
    }


def test_columns_that_moved(tmp_path: Path) -> None:
    view = view_of("qwen35", tmp_path / "qwen")
    moved = {name for name in view.tensors if not view.same_columns(name) and name.startswith("blk.0")}
    assert moved == {"blk.0.ssm_out.weight"}
    assert view.required_float("blk.0.ssm_conv1d.weight")
    assert view.required_float("blk.0.ssm_a")
    view = view_of("gpt2", tmp_path / "gpt2")
    assert not view.same_columns("blk.0.attn_qkv.weight")
    assert view.same_columns("token_embd.weight")
    view = view_of("deepseek-v3", tmp_path / "deepseek")
    assert not view.same_columns("blk.0.attn_k_b.weight")
    assert view.same_columns("blk.0.attn_v_b.weight")


def test_blocks_move_undecoded(tmp_path: Path) -> None:
    path = gguf_models.write_gguf(view_of("llama", tmp_path / "model"), tmp_path / "a.gguf", Type.Q8_0)
    view = GGUFView(GGUFCheckpoint(path))
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.0.ffn_down.weight", "output.weight"):
        coded = view.read_coded(name)
        assert coded is not None
        assert coded.scheme == view.tensors[name].scheme == GGMLBlock("q8_0")
        assert coded.arrays["blocks"].numpy().tobytes() == held[name].data.tobytes()
        part = view.read_coded(name, 3, 40)
        assert part is not None
        assert torch.equal(part.dequantize(), coded.dequantize()[3:40])
        assert torch.equal(view.read(name, 3, 40), coded.dequantize()[3:40])
    assert view.read_coded("output_norm.weight") is None


def test_four_bit_experts_are_repacked(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = gguf_models.save("gpt-oss", tmp_path)
    changes = gguf_models.four_bit_experts()
    plain = {
        stem: convert_moe_packed_tensors(changes[f"{stem}_blocks"], changes[f"{stem}_scales"], dtype=torch.float32)
        for stem in (name for name, values in changes.items() if values is None)
    }  # [experts, in, out]
    view = GGUFView(gguf_models.edit(folder, changes))
    for layer in range(2):
        stem, block = f"model.layers.{layer}.mlp.experts", f"blk.{layer}"
        both = plain[f"{stem}.gate_up_proj"].transpose(1, 2)
        expected = {"gate": both[:, ::2], "up": both[:, 1::2], "down": plain[f"{stem}.down_proj"].transpose(1, 2)}
        for name, values in expected.items():
            target = f"{block}.ffn_{name}_exps.weight"
            assert view.tensors[target].scheme == GGMLBlock("mxfp4")
            assert torch.equal(view.read(target), values)
            coded = view.read_coded(target, 1, 3)
            assert coded is not None
            assert torch.equal(coded.dequantize(), values[1:3])
            assert coded.arrays["blocks"].shape == (2, values.shape[1], values.shape[2] // 32 * 17)


def test_experts_one_by_one_or_stacked(tmp_path: Path) -> None:
    folder = gguf_models.save("qwen3moe", tmp_path)
    view = GGUFView(FolderCheckpoint(folder))
    before = {name: view.read(name) for name in view.tensors}
    held, changes = load_file(folder / "model.safetensors"), dict[str, Tensor | None]()
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        changes |= {name: None for name in held if name.startswith(f"{stem}.")}
        both = [torch.cat([held[f"{stem}.{e}.{part}_proj.weight"] for part in ("gate", "up")]) for e in range(4)]
        changes[f"{stem}.gate_up_proj"] = torch.stack(both)
        changes[f"{stem}.down_proj"] = torch.stack([held[f"{stem}.{e}.down_proj.weight"] for e in range(4)])
    stacked = GGUFView(gguf_models.edit(folder, changes))
    assert stacked.tensors.keys() == before.keys()
    assert all(torch.equal(stacked.read(name), values) for name, values in before.items())
    with pytest.raises(InputError, match=r"lacks tensor 'model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight'"):
        GGUFView(gguf_models.edit(folder, {"model.layers.1.mlp.experts.down_proj": None}))


def test_lazy_nodes(tmp_path: Path) -> None:
    source = FolderCheckpoint(tiny.llama(tmp_path, hidden_size=64))
    leaf = Leaf(source, "model.layers.0.mlp.up_proj.weight")
    values = leaf.read()
    index = torch.tensor([5, 120, 5, 0])
    assert torch.equal(Rows((leaf, leaf), index + 3).read(1, 4), torch.cat([values, values])[index[1:] + 3])
    assert torch.equal(Transposed(leaf).read(10, 20), values.T[10:20])
    assert torch.equal(Reshaped(leaf, (4, 32, 64)).read(1, 3), values.reshape(4, 32, 64)[1:3])
    assert torch.equal(Reshaped(leaf, (128 * 64,)).read(70, 200), values.flatten()[70:200])
    assert Rows((leaf,), index[:0]).read().shape == (0, 64)


# --- metadata


def keys_of(view: GGUFView) -> dict[str, Any]:
    return {key: value.data for key, value in view.metadata().items()}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2", "qwen3", "qwen3moe", "starcoder2", "gpt-oss", "glm4moe"])
@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3"])
def test_rope_scaling_in_old_and_new_keys(name: str, kind: str, tmp_path: Path) -> None:
    folder = gguf_models.save(name, tmp_path)
    said = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, rest = 12345.0, {key: said[key] for key in ("partial_rotary_factor",) if key in said}
    new = {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **rest, **_YARN}}
    old = {"rope_parameters": ..., "rope_theta": theta, **rest, "rope_scaling": {"type": kind, **_YARN}}
    first, second = (GGUFView(gguf_models.edit(folder, {}, **config)) for config in (new, old))
    keys = keys_of(first)
    assert keys == keys_of(second)
    assert first.tensors == second.tensors
    arch = keys["general.architecture"]
    assert keys[f"{arch}.rope.freq_base"] == theta
    if kind == "llama3":
        assert torch.equal(first.read("rope_freqs.weight"), second.read("rope_freqs.weight"))
        assert first.sources("rope_freqs.weight") == ()
    else:
        assert keys[f"{arch}.rope.scaling.type"] == kind
        assert keys[f"{arch}.rope.scaling.factor"] == 4.0
    if kind == "yarn":
        assert keys[f"{arch}.rope.scaling.original_context_length"] == 64
        assert keys[f"{arch}.rope.scaling.yarn_beta_fast"] == 16.0
    assert "rope_theta" not in (old["rope_scaling"] or {})  # nobody changed what they were given


@pytest.mark.parametrize("kind", ["dynamic", "ntk", "something"])
def test_unknown_rope_scaling_is_refused(kind: str, tmp_path: Path) -> None:
    folder = gguf_models.save("llama", tmp_path)
    parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(InputError, match=f"rope scaling '{kind}' is none that a GGUF file states"):
        GGUFView(gguf_models.edit(folder, {}, rope_parameters=parameters))


def test_llama3_divisors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = gguf_models.save("llama3", tmp_path)
    made, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), torch.device("cpu"))
    plain = 1.0 / (5e5 ** (torch.arange(0, 32, 2, dtype=torch.float32) / 32))
    assert torch.allclose(GGUFView(FolderCheckpoint(folder)).read("rope_freqs.weight"), plain / made, rtol=1e-6)


def test_head_width_of_the_config_wins(tmp_path: Path) -> None:
    keys = keys_of(view_of("llama", tmp_path, hidden_size=80, head_dim=16))
    assert keys["llama.attention.key_length"] == keys["llama.attention.value_length"] == 16
    assert keys["llama.rope.dimension_count"] == 16
    assert keys["llama.embedding_length"] == 80


def test_what_the_config_leaves_out_is_as_in_transformers(tmp_path: Path) -> None:
    folder = gguf_models.save("gemma3", tmp_path)
    whole = keys_of(GGUFView(FolderCheckpoint(folder)))
    said = json.loads((folder / "config.json").read_text())
    held = GGUFView(gguf_models.edit(folder, {}, rope_parameters=..., rms_norm_eps=..., tie_word_embeddings=...))
    assert keys_of(held) == whole
    assert said["rms_norm_eps"] == pytest.approx(whole["gemma3.attention.layer_norm_rms_epsilon"])
    assert whole["gemma3.rope.freq_base_swa"] == 1e4


def test_general_metadata(tmp_path: Path) -> None:
    folder = gguf_models.save("llama", tmp_path / "Tiny-Llama-0.1M-Chat-v1.5")
    card = "---\nlicense: apache-2.0\ntags: [text, small]\nlanguage:\n- de\n- en\n---\n# Tiny\n"
    (folder / "README.md").write_text(card)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    keys = keys_of(GGUFView(FolderCheckpoint(folder)))
    general = {key: value for key, value in keys.items() if key.startswith("general.")}
    assert general == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny Llama 0.1M Chat v1.5",
        "general.basename": "Tiny-Llama",
        "general.finetune": "Chat",
        "general.version": "v1.5",
        "general.size_label": "126K",
        "general.license": "apache-2.0",
        "general.tags": ["text", "small"],
        "general.languages": ["de", "en"],
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
    }
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "general.license" not in keys_of(GGUFView(FolderCheckpoint(folder)))


def test_size_labels() -> None:
    assert size_label({"token_embd.weight": 134_515_008}, 0) == "135M"
    assert size_label({"a": 6_738_415_616}, 0) == "6.7B"
    assert size_label({"a": 1_605_636_096, "blk.0.ffn_up_exps.weight": 45_097_156_608}, 8) == "8x7.2B"


# --- what is and is not taken


def test_unknown_classes_and_arch(tmp_path: Path) -> None:
    folder = gguf_models.save("llama", tmp_path)
    foreign = gguf_models.edit(folder, {}, architectures=["MyOwnForCausalLM"], model_type="myown")
    with pytest.raises(InputError, match=r"class 'MyOwnForCausalLM' is not known.*--arch llama takes it as a Llama"):
        GGUFView(foreign)
    assert GGUFView(foreign, "llama").architecture.model_class == "LlamaForCausalLM"
    with pytest.raises(InputError, match=r"'llamma' is no GGUF architecture that is known \(known are llama, "):
        GGUFView(foreign, "llamma")
    with pytest.raises(InputError, match=r"lacks tensor 'model\.layers\.0\.self_attn\.q_norm\.weight'"):
        GGUFView(foreign, "qwen3")
    unnamed = gguf_models.edit(folder, {}, architectures=..., model_type="llama")
    assert GGUFView(unnamed).architecture.name == "llama"


def test_every_tensor_is_used_or_refused(tmp_path: Path) -> None:
    folder = gguf_models.save("llama", tmp_path)
    stem = "model.layers.1.self_attn"
    held = load_file(folder / "model.safetensors")
    odd = gguf_models.edit(folder, {f"{stem}.q_proj.weight_scale": torch.ones(1)})
    with pytest.raises(
        InputError, match=r"'model\.layers\.1\.self_attn\.q_proj\.weight_scale' has no place in .*llama"
    ):
        GGUFView(odd)
    buffers = {f"{stem}.rotary_emb.inv_freq": torch.ones(8), f"{stem}.masked_bias": torch.ones(1)}
    view = GGUFView(gguf_models.edit(folder, {f"{stem}.q_proj.weight_scale": None, **buffers}))
    assert view.dropped == dict.fromkeys(buffers, "a buffer that engines compute")
    with pytest.raises(InputError, match=r"lacks tensor 'model\.layers\.1\.self_attn\.k_proj\.bias'$"):
        GGUFView(gguf_models.edit(folder, {f"{stem}.k_proj.bias": None}))
    heads = {f"{stem}.k_proj.bias": held[f"{stem}.k_proj.bias"][:24].clone()}
    with pytest.raises(InputError, match=r"k_proj\.bias' of shape \[24\] does not fit .* 24 rows, not 2 heads of 32"):
        GGUFView(gguf_models.edit(folder, heads))


def test_heads_that_are_the_embedding(tmp_path: Path) -> None:
    folder = gguf_models.save("llama", tmp_path / "llama")
    held = load_file(folder / "model.safetensors")
    view = GGUFView(gguf_models.edit(folder, {}, tie_word_embeddings=True))
    assert view.dropped == {"lm_head.weight": "the head is the embedding"}
    assert "output.weight" not in view.tensors
    with pytest.raises(InputError, match=r"lacks tensor 'lm_head\.weight'.*--assume-tied"):
        GGUFView(gguf_models.edit(folder, {"lm_head.weight": None}, tie_word_embeddings=False))
    # llama.cpp wants a head of gpt-oss in any case, and has no place for one of Gemma 2.
    folder = gguf_models.save("gpt-oss", tmp_path / "oss")
    view = GGUFView(gguf_models.edit(folder, {"lm_head.weight": None}, tie_word_embeddings=True))
    assert torch.equal(view.read("output.weight"), view.read("token_embd.weight"))
    folder = gguf_models.save("gemma2", tmp_path / "gemma")
    with pytest.raises(InputError, match="has a head of its own"):
        GGUFView(gguf_models.edit(folder, {"lm_head.weight": held["lm_head.weight"]}, tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "'hidden_act' 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "'query_pre_attn_scalar' 144"),
        ("qwen2moe", {"norm_topk_prob": True}, "'norm_topk_prob' True"),
        ("qwen3moe", {"mlp_only_layers": [1]}, "'mlp_only_layers'"),
        ("falcon", {"alibi": True}, "'alibi' True"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "'swiglu_limit' 5.0"),
        ("llama4", {"attention_chunk_size": 16}, "'attention_chunk_size' 16"),
    ],
)
def test_settings_that_llamacpp_does_not_follow(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = gguf_models.edit(gguf_models.save(name, tmp_path), {}, **changes)
    with pytest.raises(InputError, match=rf"config\.json has {message}, which llama\.cpp's loader"):
        GGUFView(source)


@pytest.mark.parametrize("name", ["llava", "gemma3-vision"])
def test_towers_are_left_out(name: str, tmp_path: Path) -> None:
    changes = {"text_config": {**towers.ARCHITECTURES[name][1]["text_config"], "query_pre_attn_scalar": 16}}
    source = FolderCheckpoint(towers.save(name, tmp_path, **changes))
    view = GGUFView(source)
    assert view.architecture.name == {"llava": "llama", "gemma3-vision": "gemma3"}[name]
    left = {n for n in source.tensors if "vision" in n or "projector" in n}
    assert {n for n, why in view.dropped.items() if "mmproj" in why} == left
    assert view.notices == [f"the text model only: {len(left)} tensors of its other parts belong in an mmproj file"]
    assert view.metadata()[f"{view.architecture.name}.vocab_size"].data == towers.VOCABULARY
    assert "blk.1.ffn_down.weight" in view.tensors


def test_names_with_and_without_a_prefix(tmp_path: Path) -> None:
    for name, prefix in (("gpt2", "transformer."), ("bert", "bert."), ("qwen3", "model.")):
        folder = gguf_models.save(name, tmp_path / name)
        view = GGUFView(FolderCheckpoint(folder))
        before = {key: view.read(key) for key in view.tensors}
        held = load_file(folder / "model.safetensors")
        other: dict[str, Tensor | None] = dict.fromkeys(held)
        for key, values in held.items():
            moved = key.removeprefix(prefix) if key.startswith(prefix) else prefix + key
            other[key if key.startswith("lm_head") else moved] = values
        after = GGUFView(gguf_models.edit(folder, other))
        assert list(after.tensors) == list(before)
        assert all(torch.equal(after.read(key), values) for key, values in before.items())


def test_models_without_a_head(tmp_path: Path) -> None:
    folder = gguf_models.save("qwen3", tmp_path)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
    bare = gguf_models.edit(folder, {"lm_head.weight": None})
    assert "output.weight" not in GGUFView(bare, assume_tied=True).tensors
    keys = keys_of(GGUFView(gguf_models.edit(folder, {}, architectures=["Qwen3Model"])))
    assert keys["qwen3.pooling_type"] == 3


def test_notices(tmp_path: Path) -> None:
    folder = gguf_models.save("mistral", tmp_path)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, **_YARN, "truncate": False}
    notices = GGUFView(gguf_models.edit(folder, {}, sliding_window=16, rope_parameters=yarn)).notices
    assert [notice.split(":")[0] for notice in notices] == ["yarn", "yarn", notices[2]]
    assert notices[2] == "llama.cpp attends to everything here, the model to the last 16 tokens"
    assert GGUFView(gguf_models.edit(folder, {}, sliding_window=None, rope_parameters=...)).notices == []


# --- blocks that predict further tokens


def test_blocks_for_further_tokens_qwen(tmp_path: Path) -> None:
    folder = gguf_models.save("qwen35", tmp_path)
    more = gguf_models.further_block(folder)
    norm = more["mtp.norm.weight"]
    assert norm is not None
    view = GGUFView(gguf_models.edit(folder, more))
    keys = keys_of(view)
    assert (keys["qwen35.block_count"], keys["qwen35.nextn_predict_layers"]) == (5, 1)
    assert keys["qwen35.attention.recurrent_layers"] == [True, True, False, True, False]
    assert torch.equal(view.read("blk.4.attn_q.weight"), view.read("blk.2.attn_q.weight"))
    assert torch.equal(view.read("blk.4.nextn.hnorm.weight"), norm + 1)
    assert view.tensors["blk.4.nextn.eh_proj.weight"].shape == (64, 128)
    back = GGUFCheckpoint(gguf_models.write_gguf(view, tmp_path / "m.gguf", Type.F32))
    assert set(more) <= back.tensors.keys()
    assert back.config["num_hidden_layers"] == 4


def test_blocks_for_further_tokens_behind_the_others(tmp_path: Path) -> None:
    def behind(folder: Path, names: list[str]) -> FolderCheckpoint:
        held = load_file(folder / "model.safetensors")
        more: dict[str, Tensor | None] = {
            name.replace(".1.", ".2.", 1): value.clone() for name, value in held.items() if ".layers.1." in name
        }
        more |= {f"model.layers.2.{name}.weight": torch.ones(64, 128 if "proj" in name else 64) for name in names}
        return gguf_models.edit(folder, more)

    glm = GGUFView(behind(gguf_models.save("glm4moe", tmp_path / "glm"), ["eh_proj", "enorm", "hnorm"]))
    keys = keys_of(glm)
    assert (keys["glm4moe.block_count"], keys["glm4moe.nextn_predict_layers"]) == (3, 1)
    assert {"blk.2.nextn.eh_proj.weight", "blk.2.ffn_up_exps.weight"} <= glm.tensors.keys()
    deepseek = GGUFView(behind(gguf_models.save("deepseek-v3", tmp_path / "deepseek"), ["eh_proj"]))
    assert keys_of(deepseek)["deepseek2.block_count"] == 2
    assert {why for name, why in deepseek.dropped.items() if ".layers.2." in name} == {
        "predicts further tokens: llama.cpp has no place for it in this architecture"
    }
