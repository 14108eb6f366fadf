"""Mamba: state-space blocks and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantize.formats.gguf.architectures.base import Architecture, Form, Rule, Where, always, bias, block, outer, weight
from quantize.formats.gguf.architectures.operations import MINUS_EXP, SAME, SQUEEZE, Operation
from quantize.formats.gguf.architectures.settings import HIDDEN, RMS, Field, Keys, Settings
from quantize.formats.gguf.metadata import Value, f32, flag, u32

# A model without positions has no longest context; llama.cpp takes this for the default.
_CONTEXT = 1 << 20


def state_space(source: str, where: Where = always) -> tuple[Rule, ...]:
    """Returns the rules of a state-space mixer, `source` after the block's name."""

    def bare(target: str, name: str, operation: Operation = SAME) -> Rule:
        return Rule((f"blk.{{n}}.{target}",), (Form((f".{source}.{name}",), operation),), where)

    return (
        *block("ssm_in", f"{source}.in_proj", where=where),
        weight("blk.{n}.ssm_conv1d", f".{source}.conv1d", SQUEEZE, where),
        bias("blk.{n}.ssm_conv1d", f".{source}.conv1d", where=where),
        *block("ssm_x", f"{source}.x_proj", where=where),
        *block("ssm_dt", f"{source}.dt_proj", where=where, biased=True),
        bare("ssm_a", "A_log", MINUS_EXP),
        bare("ssm_d", "D"),
        *block("ssm_out", f"{source}.out_proj", where=where),
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes of the state, and those that a model without attention lacks."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns them."""
        hidden = settings.hidden
        inner = settings.get("intermediate_size", "d_inner", default=2 * hidden)
        if inner != 2 * hidden:
            raise settings.refuse(f"config.json has 'intermediate_size' {inner}, not twice {hidden}")
        rank = settings.get("time_step_rank", "dt_rank")
        found = {
            "context_length": _CONTEXT,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "ssm.conv_kernel": settings.get("conv_kernel", "d_conv", default=4),
            "ssm.inner_size": inner,
            "ssm.state_size": settings.get("state_size", "d_state", default=16),
            "ssm.time_step_rank": -(-hidden // 16) if rank in (None, "auto") else rank,
        }
        return {key: u32(value) for key, value in found.items()} | {"ssm.dt_b_c_rms": flag(False)}

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns them."""
        return {
            "conv_kernel": keys.whole("ssm.conv_kernel"),
            "intermediate_size": keys.whole("ssm.inner_size"),
            "expand": keys.whole("ssm.inner_size") // max(keys.whole(HIDDEN.key), 1),
            "state_size": keys.whole("ssm.state_size"),
            "time_step_rank": keys.whole("ssm.time_step_rank"),
        }


def _check(settings: Settings) -> None:
    settings.require("use_bias", False)
    settings.require("use_conv_bias", True)
    settings.require("hidden_act", "silu")


MAMBA = Architecture(
    "mamba",
    "mamba",
    "MambaForCausalLM",
    rules=(
        *outer("backbone.embeddings", "backbone.norm_f"),
        *block("attn_norm", "norm"),
        *state_space("mixer"),
    ),
    fields=(HIDDEN, _Sizes(), Field(RMS.key, ("layer_norm_epsilon", "rms_norm_eps"), f32)),
    layer="backbone.layers.{n}",
    classes=("MambaLMHeadModel",),
    prefix="backbone.",
    rotated=None,
    check=_check,
)
