"""Shapes of models on which the named mixes of GGUF differ, and a short spelling of the types they get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from quantize.formats.gguf.mixes import MIXES, Facts

Shapes = dict[str, tuple[int, ...]]

NAMES = [mix.name for mix in dict.fromkeys(MIXES.values())]


@dataclass(frozen=True)
class Model:
    """A model as the mixes see it, and the header keys (without architecture) that llama.cpp demands of it."""

    facts: Facts
    shapes: Shapes
    keys: dict[str, int | float] = field(default_factory=dict)


def stem(hidden: int, tied: bool) -> Shapes:
    shapes: Shapes = {"token_embd.weight": (512, hidden), "output_norm.weight": (hidden,)}
    return shapes if tied else shapes | {"output.weight": (512, hidden)}


def attention(layer: int, hidden: int, heads: int, kv_heads: int, bias: bool = False) -> Shapes:
    narrow, at = hidden // heads * kv_heads, f"blk.{layer}"
    shapes: Shapes = {
        f"{at}.attn_norm.weight": (hidden,),
        f"{at}.attn_q.weight": (hidden, hidden),
        f"{at}.attn_k.weight": (narrow, hidden),
        f"{at}.attn_v.weight": (narrow, hidden),
        f"{at}.attn_output.weight": (hidden, hidden),
        f"{at}.ffn_norm.weight": (hidden,),
    }
    return shapes | ({f"{at}.attn_q.bias": (hidden,)} if bias else {})


def dense(layer: int, hidden: int, ffn: int, suffix: str = "") -> Shapes:
    at = f"blk.{layer}"
    return {
        f"{at}.ffn_gate{suffix}.weight": (ffn, hidden),
        f"{at}.ffn_up{suffix}.weight": (ffn, hidden),
        f"{at}.ffn_down{suffix}.weight": (hidden, ffn),
    }


def experts(layer: int, hidden: int, ffn: int, count: int) -> Shapes:
    stacked = {name: (count, *shape) for name, shape in dense(layer, hidden, ffn, "_exps").items()}
    return {**stacked, f"blk.{layer}.ffn_gate_inp.weight": (count, hidden)}


def transformer(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    *,
    architecture: str = "llama",
    tied: bool = False,
    count: int = 0,
    shared: bool = False,
) -> Model:
    shapes = stem(hidden, tied)
    for layer in range(layers):
        shapes |= attention(layer, hidden, heads, kv_heads, bias=architecture == "qwen2")
        shapes |= experts(layer, hidden, ffn, count) if count else dense(layer, hidden, ffn)
        if shared:
            shapes |= dense(layer, hidden, ffn, "_shexp")
            shapes[f"blk.{layer}.ffn_gate_inp_shexp.weight"] = (1, hidden)
    keys: dict[str, int | float] = {"feed_forward_length": ffn}
    if count:
        keys |= {"expert_used_count": 2, "expert_feed_forward_length": ffn}
    return Model(Facts(architecture, layers, heads, kv_heads, count), shapes, keys)


def falcon(layers: int, hidden: int, heads: int) -> Model:
    shapes = stem(hidden, tied=False) | {"output_norm.bias": (hidden,)}
    for layer in range(layers):
        at = f"blk.{layer}"
        shapes |= {
            f"{at}.attn_norm.weight": (hidden,),
            f"{at}.attn_qkv.weight": (hidden + 2 * hidden // heads, hidden),
            f"{at}.attn_output.weight": (hidden, hidden),
            f"{at}.ffn_up.weight": (4 * hidden, hidden),
            f"{at}.ffn_down.weight": (hidden, 4 * hidden),
        }
    keys: dict[str, int | float] = {"feed_forward_length": 4 * hidden, "attention.layer_norm_epsilon": 1e-5}
    return Model(Facts("falcon", layers, heads, 1), shapes, keys)


def mamba(layers: int, hidden: int) -> Model:
    shapes, inner, state, rank = stem(hidden, tied=True), 2 * hidden, 16, hidden // 16
    for layer in range(layers):
        at = f"blk.{layer}"
        shapes |= {
            f"{at}.attn_norm.weight": (hidden,),
            f"{at}.ssm_in.weight": (2 * inner, hidden),
            f"{at}.ssm_conv1d.weight": (inner, 4),
            f"{at}.ssm_conv1d.bias": (inner,),
            f"{at}.ssm_x.weight": (rank + 2 * state, inner),
            f"{at}.ssm_dt.weight": (inner, rank),
            f"{at}.ssm_dt.bias": (inner,),
            f"{at}.ssm_a": (inner, state),
            f"{at}.ssm_d": (inner,),
            f"{at}.ssm_out.weight": (hidden, inner),
        }
    keys: dict[str, int | float] = {"ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": state}
    keys |= {"ssm.time_step_rank": rank, "feed_forward_length": 0}
    return Model(Facts("mamba", layers, 0, 0), shapes, keys)


def latent(layers: int, hidden: int, count: int) -> Model:
    """Attention over a compressed cache, one dense layer, then experts and shared ones."""
    shapes = stem(hidden, tied=False)
    for layer in range(layers):
        at = f"blk.{layer}"
        shapes |= {
            f"{at}.attn_norm.weight": (hidden,),
            f"{at}.attn_q.weight": (1536, hidden),
            f"{at}.attn_kv_a_mqa.weight": (576, hidden),
            f"{at}.attn_kv_a_norm.weight": (512,),
            f"{at}.attn_kv_b.weight": (2048, 512),
            f"{at}.attn_output.weight": (hidden, 1024),
            f"{at}.ffn_norm.weight": (hidden,),
        }
        shapes |= dense(layer, hidden, 1536, "_shexp" if layer else "")
        shapes |= experts(layer, hidden, 768, count) if layer else {}
    keys: dict[str, int | float] = {
        "feed_forward_length": 1536, "expert_used_count": 4, "expert_feed_forward_length": 768,
        "expert_shared_count": 2, "leading_dense_block_count": 1, "attention.kv_lora_rank": 512,
        "attention.q_lora_rank": 0,
        "attention.key_length": 192, "attention.value_length": 128, "rope.dimension_count": 64,
        "expert_weights_scale": 1.0,
    }  # fmt: skip
    return Model(Facts("deepseek2", layers, 8, 8, count), shapes, keys)


def per_layer(layers: int, hidden: int) -> Model:
    """Embeddings of each layer, and the small matrices around them."""
    shapes = stem(hidden, tied=True)
    shapes["per_layer_token_embd.weight"] = (512, 256 * layers)
    shapes["per_layer_model_proj.weight"] = (256 * layers, hidden)
    shapes |= {f"altup_{name}.weight": (3, hidden, hidden) for name in ("proj", "unembd_proj")}
    for layer in range(layers):
        at = f"blk.{layer}"
        shapes |= attention(layer, hidden, 8, 2) | dense(layer, hidden, 2 * hidden)
        shapes |= {f"{at}.laurel_l.weight": (64, hidden), f"{at}.laurel_r.weight": (hidden, 64)}
        shapes |= {f"{at}.inp_gate.weight": (256, hidden), f"{at}.proj.weight": (hidden, 256)}
        shapes |= {f"{at}.altup_router.weight": (4, hidden)}
    keys: dict[str, int | float] = {"feed_forward_length": 2 * hidden, "attention.sliding_window": 512}
    return Model(Facts("gemma3n", layers, 8, 2), shapes, keys)


MODELS: dict[str, Model] = {
    "llama, tied, 3 share": transformer(12, 768, 1536, 9, 3, tied=True),
    "llama, untied, none share": transformer(10, 512, 1280, 8, 8),
    "llama, odd rows": transformer(8, 320, 672, 5, 5),
    "llama, tied, odder rows": transformer(4, 64, 172, 4, 2, tied=True),
    "llama, 80 layers, 8 share": transformer(80, 512, 1024, 16, 2),
    "qwen2, 80 layers, 8 share": transformer(80, 512, 1024, 16, 2, architecture="qwen2"),
    "mixtral, 8 experts, 4 share": transformer(16, 512, 768, 8, 2, count=8),
    "mixtral, 4 experts, none share": transformer(9, 512, 768, 8, 8, count=4),
    "qwen2moe, 16 experts and shared ones": transformer(
        16, 512, 768, 8, 4, architecture="qwen2moe", count=16, shared=True
    ),
    "falcon": falcon(32, 512, 8),
    "mamba": mamba(9, 512),
    "deepseek2, 20 experts": latent(9, 512, 20),
    "gemma3n": per_layer(10, 512),
}


def brief(types: Mapping[str, str]) -> str:
    """Returns types by tensor in one line: the commonest, then for each other kind and type the layers, as in
    `q4_k; attn_v q6_k 0-2,5`.
    """
    counts = Counter(types.values())
    usual = max(sorted(counts), key=counts.__getitem__)
    layers: dict[tuple[str, str], list[int]] = {}
    for name, kind in types.items():
        if kind != usual:
            layer, _, rest = name.removeprefix("blk.").partition(".") if name.startswith("blk.") else ("-1", "", name)
            layers.setdefault((rest.removesuffix(".weight"), kind), []).append(int(layer))
    kinds = sorted((name, kind, sorted(found)) for (name, kind), found in layers.items())
    return "; ".join([usual, *(f"{name} {kind}{_runs(found)}" for name, kind, found in kinds)])


def _runs(numbers: list[int]) -> str:
    if numbers == [-1]:
        return ""
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    return " " + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def quantized(shapes: Shapes, types: Mapping[str, str | None]) -> dict[str, str]:
    """Returns the types without those of vectors; matrices that are kept are bfloat16."""
    return {name: kind or "bf16" for name, kind in types.items() if len(shapes[name]) > 1}


def cases() -> Iterator[tuple[str, str, bool]]:
    """Yields model, mix and whether importance is given."""
    for model in MODELS:
        for mix in NAMES:
            for importance in (False, True):
                yield model, mix, importance
