"""Gemma 3, the language model."""

from quantize.formats.gguf.architectures.base import DECODER, Architecture, attention, head_norms, mlp, outer
from quantize.formats.gguf.architectures.gemma2 import check_scale, four_norms, scale_back
from quantize.formats.gguf.architectures.operations import PLUS_ONE
from quantize.formats.gguf.architectures.settings import Field, Settings, Window
from quantize.formats.gguf.metadata import f32


def _check(settings: Settings) -> None:
    check_scale(settings, 62)
    settings.require("attn_logit_softcapping")
    settings.require("use_bidirectional_attention", False)


GEMMA3 = Architecture(
    "gemma3",
    "gemma3_text",
    "Gemma3ForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm", operation=PLUS_ONE),
        *four_norms(PLUS_ONE),
        *attention(),
        *head_norms(PLUS_ONE),
        *mlp(),
    ),
    fields=(*DECODER, Field("final_logit_softcapping", ("final_logit_softcapping",), f32, optional=True), Window(6)),
    classes=("Gemma3ForConditionalGeneration",),
    check=_check,
    back=scale_back(62),
)
