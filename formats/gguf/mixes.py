"""llama.cpp's named mixes: which tensor of a model gets which type.

`Q4_K_M` and its like are no types but recipes over tensor names, layer numbers and a few facts of the model. The types
chosen here are those of llama-quantize 0.5, tensor by tensor, but for what it gets wrong:

- a type asked for the head or the embedding goes through the shape fallback like every other; there it writes past
  its memory;
- rows that do not fit `q1_0` or `nvfp4` fall back to `q4_0`, like those of `q2_0`; there it ends with an error;
- rules of the user also hold in F32, F16 and BF16 files; there they are passed over without a word;
- pure mixes whose type cannot be made without importance give the embedding and the head, which have none, what the
  mix gives them; there the program aborts;
- tensors of four dimensions are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from quantize.errors import UsageError, unknown_name
from quantize.formats.gguf.mixrules import (
    EMBEDDINGS,
    FLOATS,
    HEAD,
    Facts,
    Part,
    Walk,
    part_of,
    protection,
    walking_order,
)
from quantize.formats.gguf.overrides import WEIGHT_TYPES, Override, Overrides
from quantize.kernels.cpu.ggml import BLOCKS, NEEDS_IMPORTANCE
from quantize.schemes import Shape

__all__ = ["MIXES", "Choice", "Facts", "Mix", "choose", "find_mix", "lacking_importance", "needs_importance"]


@dataclass(frozen=True, slots=True)
class Mix:
    """A named mix.

    Attributes:
        name: As people know it.
        file_type: Its number in a file's header, `general.file_type`.
        base: The type of most tensors.
        summary: What it is good for, in a few words.
    """

    name: str
    file_type: int
    base: str
    summary: str


# Average bits are those of Llama-3.1-8B, whose large embedding and head count; other models are a little off.
_TABLE = (
    Mix("Q1_0", 40, "q1_0", "1.1 bits, for models trained on signs"),
    Mix("IQ1_S", 24, "iq1_s", "about 2.0 bits, last resort; needs importance"),
    Mix("IQ1_M", 31, "iq1_m", "about 2.1 bits, last resort; needs importance"),
    Mix("TQ1_0", 36, "tq1_0", "1.7 bits, for models trained on three values"),
    Mix("TQ2_0", 37, "tq2_0", "2.1 bits, for models trained on three values"),
    Mix("Q2_0", 41, "q2_0", "2.3 bits, for models trained on few values"),
    Mix("IQ2_XXS", 19, "iq2_xxs", "about 2.4 bits; needs importance"),
    Mix("IQ2_XS", 20, "iq2_xs", "about 2.6 bits; needs importance"),
    Mix("IQ2_S", 28, "iq2_xs", "about 2.7 bits; needs importance"),
    Mix("IQ2_M", 29, "iq2_s", "about 2.9 bits; needs importance"),
    Mix("Q2_K_S", 21, "q2_k", "about 3.0 bits; needs importance"),
    Mix("Q2_K", 10, "q2_k", "about 3.2 bits"),
    Mix("IQ3_XXS", 23, "iq3_xxs", "about 3.3 bits; needs importance"),
    Mix("IQ3_XS", 22, "iq3_s", "about 3.5 bits; needs importance"),
    Mix("Q3_K_S", 11, "q3_k", "about 3.6 bits"),
    Mix("IQ3_S", 26, "iq3_s", "about 3.7 bits, better than Q3_K_S"),
    Mix("IQ3_M", 27, "iq3_s", "about 3.8 bits, better than Q3_K_S"),
    Mix("Q3_K_M", 12, "q3_k", "about 4.0 bits"),
    Mix("Q3_K_L", 13, "q3_k", "about 4.3 bits"),
    Mix("MXFP4_MOE", 38, "mxfp4", "4-bit floats for experts, 8 bits for the rest"),
    Mix("IQ4_XS", 30, "iq4_xs", "about 4.5 bits, best of its size"),
    Mix("Q4_0", 2, "q4_0", "about 4.7 bits, simple and fast"),
    Mix("IQ4_NL", 25, "iq4_nl", "about 4.7 bits, uneven steps"),
    Mix("Q4_K_S", 14, "q4_k", "about 4.7 bits"),
    Mix("Q4_K_M", 15, "q4_k", "about 4.9 bits, the usual choice"),
    Mix("Q4_1", 3, "q4_1", "about 5.1 bits, simple and fast"),
    Mix("Q5_0", 8, "q5_0", "about 5.6 bits, simple"),
    Mix("Q5_K_S", 16, "q5_k", "about 5.6 bits"),
    Mix("Q5_K_M", 17, "q5_k", "about 5.7 bits"),
    Mix("Q5_1", 9, "q5_1", "about 6.1 bits, simple"),
    Mix("Q6_K", 18, "q6_k", "6.6 bits, hardly any loss"),
    Mix("Q8_0", 7, "q8_0", "8.5 bits, practically no loss"),
    Mix("F16", 1, "f16", "half precision"),
    Mix("BF16", 32, "bf16", "bfloat16"),
    Mix("F32", 0, "f32", "single precision"),
)
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# By every name that llama-quantize takes, aliases included.
MIXES: dict[str, Mix] = {mix.name: mix for mix in _TABLE}
MIXES |= {alias: MIXES[name] for alias, name in _ALIASES.items()}

# Types that make poor models without importance. Those in `NEEDS_IMPORTANCE` cannot even be made.
_NEEDY = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})

# What stands in for a type whose block does not divide the row; F16 where that does not fit either.
_FALLBACK: dict[str, str] = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q1_0", "q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0", "nvfp4"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided for one tensor.

    Attributes:
        type: GGML type in lower case; None keeps the source's.
        rule: Why, in a few words.
        wanted: The type before the shape fallback, where it differs.
    """

    type: str | None
    rule: str
    wanted: str | None = None


def find_mix(name: str) -> Mix:
    """Returns the mix called `name`, in any case, or with that number in llama.cpp's list.

    Raises:
        UsageError: there is none.
    """
    numbered = {str(mix.file_type): mix for mix in _TABLE}
    found = MIXES.get(name.upper()) or numbered.get(name)
    if found is None:
        if (kind := name.lower()) in WEIGHT_TYPES:
            hint = f"say --type Q8_0 --set '*={kind}', or --tensor-type 'PATTERN={kind}' for some tensors"
            raise UsageError(f"'{name}' is a type of tensors, not of whole files", hint)
        raise unknown_name("GGUF type", name, MIXES)
    return found


def needs_importance(type: str, mix: Mix) -> bool:
    """Returns whether tensors of a type are refused without importance data in a mix.

    Head and embedding are exempt, since they have none as a rule: see `lacking_importance`.
    """
    return type in _NEEDY or (type == "q2_k" and mix.name == "Q2_K_S")


def lacking_importance(choices: Mapping[str, Choice], mix: Mix, covered: Collection[str]) -> list[str]:
    """Returns the tensors that cannot be made: their type needs importance and they are not in `covered`."""
    exempt = {*EMBEDDINGS, HEAD}
    return [
        name
        for name, choice in choices.items()
        if choice.type is not None
        and (choice.type in NEEDS_IMPORTANCE if name in exempt else needs_importance(choice.type, mix))
        and name not in covered
    ]


def fit(type: str, width: int) -> str:
    """Returns the type itself if rows of `width` weights hold whole blocks of it, else what stands in for it."""
    if width % BLOCKS[type].weights == 0:
        return type
    spare = _FALLBACK.get(type, type)
    return spare if width % BLOCKS[spare].weights == 0 else "f16"


def choose(
    mix: Mix,
    tensors: Mapping[str, Shape],
    facts: Facts,
    *,
    importance: bool,
    pure: bool = False,
    output: str | None = None,
    embedding: str | None = None,
    overrides: Sequence[Override] = (),
    leave_output: bool = False,
    blind: frozenset[str] = frozenset(),
) -> dict[str, Choice]:
    """Returns a type for every tensor of a model.

    Args:
        mix: The recipe.
        tensors: Shapes in torch's order by GGUF name: all of the model, since rules count and look for a head.
        facts: What the rules ask of the model.
        importance: Whether importance data is given; some rules spend more without.
        pure: Whether every tensor gets the main type, without the mix's exceptions.
        output: Type of the head, also where the embedding is the head.
        embedding: Type of the embeddings; before `output` where the embedding is the head.
        overrides: Rules for single tensors, before the mix; the first that fits a name wins. `output` and
            `embedding` come before them.
        leave_output: Whether `output.weight` is kept.
        blind: Tensors that no text reaches (extra prediction layers, embeddings of each layer). Where nobody asked
            for a type they get 8 bits or more; llama.cpp has no such rule.

    Raises:
        UsageError: an embedding is to get a type that cannot be made without importance, which a look-up never has.
    """
    rules = Overrides(overrides)
    parts = [part_of(name) for name in tensors]
    walk = Walk(mix.name, mix.base, facts, importance, parts.count(Part.VALUE), tied=Part.HEAD not in parts)
    found: dict[str, Choice] = {}
    for name in walking_order(tensors):
        shape, part = tensors[name], part_of(name)
        reason = protection(name, shape, facts.architecture)
        rule = rules.find(name)
        if reason is None and leave_output and part is Part.HEAD:
            reason = "the head, as asked"
        if reason is not None:
            found[name] = Choice(None, f"kept: {reason}{f', whatever {rule} says' if rule else ''}")
            continue
        named_apart = name == "per_layer_token_embd.weight" and rule is not None
        if part is Part.EMBEDDING and embedding is not None and not named_apart:
            chosen, why = _embedding(name, embedding), "embedding: as asked"
        elif part is Part.HEAD and output is not None:
            chosen, why = output, "head: as asked"
        elif rule is not None:
            chosen, why = _embedding(name, rule.type) if part is Part.EMBEDDING else rule.type, f"as asked: {rule}"
        else:
            chosen, why = _by_mix(mix, walk, name, shape, output, pure)
            if name in blind and chosen not in FLOATS and chosen != "q8_0":
                chosen, why = "q8_0", "no text reaches it: at least 8 bits"
        fitting = fit(chosen, shape[-1])
        found[name] = Choice(fitting, why, chosen if fitting != chosen else None)
    return {name: found[name] for name in tensors}


def _by_mix(mix: Mix, walk: Walk, name: str, shape: Shape, output: str | None, pure: bool) -> tuple[str, str]:
    """Returns type and reason where nobody asked for one."""
    if mix.base in FLOATS:
        return mix.base, f"{mix.name}: its only type"
    if not pure:
        return walk.next(name, shape, output)
    if mix.base in NEEDS_IMPORTANCE and part_of(name) in (Part.HEAD, Part.EMBEDDING):
        chosen, why = walk.next(name, shape, output)
        return chosen, f"{why}; {mix.base} needs importance, which it lacks"
    return mix.base, f"{mix.name}, pure"


def _embedding(name: str, type: str) -> str:
    if type in NEEDS_IMPORTANCE:
        raise UsageError(
            f"{name}: {type} needs importance, and rows that are looked up have none",
            "choose q2_k, iq3_s or more for it",
        )
    return type
