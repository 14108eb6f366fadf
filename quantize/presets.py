"""What a method name means where nothing else is said: scheme, format and the output's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from quantize import float_schemes, mlx_schemes
from quantize.errors import InputError, UsageError, unknown_name
from quantize.float_schemes import PackedInt
from quantize.formats import Format
from quantize.formats import table as format_table
from quantize.formats.gguf.mixes import Mix, find_mix
from quantize.kernels.cpu.ggml import ENCODERS
from quantize.methods import table as method_table
from quantize.mlx_schemes import MLXAffine
from quantize.schemes import AffineInt, GGMLBlock, Plain, Scheme, parse_scheme
from quantize.settings import Settings

# Methods and formats of the plan that do not stand yet: named so that the answer is not "unknown".
_TO_COME = ("exl2",)
_FORMATS_TO_COME = ("exl2",)
# The formats that are asked first, of those that hold what a method makes; then those of the table in order.
_FIRST_CHOICE = {"gptq": "gptq"}


# Names of grids that are said in place of a method: they are rounded to nearest. With the scheme and the suffix.
_NAMED_GRIDS = {"fp8": ("fp8-channel", "-FP8-Dynamic")}


@dataclass(frozen=True, slots=True)
class Choice:
    """A resolved combination.

    Attributes:
        method: Name of the method.
        scheme: The grid of the linears; None where a mix says it for each tensor.
        format: Name of the format.
        suffix: What the output's name gets.
        mix: llama.cpp's named mix, or None.
    """

    method: str
    scheme: Scheme | None
    format: str
    suffix: str
    mix: Mix | None = None


def choose(
    method: str | None,
    bits: int | None,
    group_size: int | None,
    symmetric: bool | None,
    target: str | None,
    type_: str | None,
) -> Choice:
    """Returns what a command means.

    Raises:
        UsageError: neither method nor type was given, or a name is unknown.
        InputError: the combination is planned but no format holds it yet.
    """
    known, methods = format_table(), method_table()
    if target is not None and target not in (*known, *_FORMATS_TO_COME):
        raise unknown_name("format", target, [*known, *_FORMATS_TO_COME])
    if method is None and type_ is None:
        if target is not None:
            raise UsageError(f"format {target} holds quantized tensors: say how", "try --method awq --bits 4")
        raise UsageError("neither --method nor --type was given", "try --method awq --bits 4, or --type Q4_K_M")
    if type_ is not None:
        if target not in (None, "gguf"):
            raise UsageError(f"--type {type_} is a GGUF type, not one of format {target}", "drop --format or --type")
        mix = find_mix(type_)
        method = method or "rtn"
        if method not in methods and method not in _TO_COME:
            raise unknown_name("method", method, methods)
        scheme = parse_scheme(mix.base)
        reason = methods[method].reject(scheme) if method in methods else "it does not stand yet"
        if reason is not None:
            raise InputError(f"--method {method} cannot choose points of {mix.name}: {reason}", "drop --method")
        return Choice(method, None, "gguf", f"-{mix.name}", mix)
    if method in _NAMED_GRIDS:
        if target not in (None, "compressed-tensors"):
            raise InputError(f"format {target} cannot hold {_NAMED_GRIDS[method][0]}", "drop --format")
        if (bits, group_size, symmetric) != (None, None, None):
            raise UsageError(f"--method {method} has one grid", "drop --bits, --group-size and --sym; say --set")
        return Choice("rtn", parse_scheme(_NAMED_GRIDS[method][0]), "compressed-tensors", _NAMED_GRIDS[method][1])
    if method not in methods:
        if method in _TO_COME:
            raise InputError(f"--method {method} does not stand yet", f"methods that do: {', '.join(methods)}")
        raise unknown_name("method", str(method), [*methods, *_NAMED_GRIDS, *_TO_COME])
    if target == "mlx":
        return _mlx(method, bits, group_size, symmetric)
    scheme = AffineInt(4 if bits is None else bits, 128 if group_size is None else group_size)
    holders = [name for name, f in known.items() if f.reject(scheme) is None]
    if target is None and not holders:
        raise InputError(f"no format here holds {scheme} yet", "'quantize list' shows what goes together")
    first = _FIRST_CHOICE.get(method)
    target = target or (first if first in holders else holders[0])
    if target == "compressed-tensors":
        scheme = PackedInt(scheme.bits, scheme.group_size)
    scheme = replace(scheme, symmetric=_usually_symmetric(method, scheme, target) if symmetric is None else symmetric)
    reason = known[target].reject(scheme) if target in known else "it does not stand yet"
    if reason is not None:
        accept = f"formats that accept it: {', '.join(holders) or 'none yet'}"
        raise InputError(
            f"format {target} cannot hold {scheme}: {reason}", "try --type Q4_K_M" if target == "gguf" else accept
        )
    return Choice(str(method), scheme, target, suffix(str(method), scheme, target))


def _mlx(method: str, bits: int | None, group_size: int | None, symmetric: bool | None) -> Choice:
    """Returns what a method means for MLX, whose grids are its own; its folders are called by their bits alone."""
    if symmetric:
        raise UsageError("--sym has no meaning for format mlx, whose grids have a bias", "drop it")
    scheme = MLXAffine(4 if bits is None else bits, 64 if group_size is None else group_size)
    if reason := method_table()[method].reject(scheme):
        raise InputError(f"--method {method} cannot choose points of {scheme}: {reason}", "try rtn or gptq")
    return Choice(method, scheme, "mlx", f"-{scheme.bits}bit")


def _usually_symmetric(method: str, scheme: AffineInt, target: str) -> bool:
    """Returns whether the grid is symmetric if nobody says: where most engines take no other."""
    if target == "compressed-tensors":
        return True
    return target in ("gptq", "gptq_v2") and (method == "gptq" or scheme.bits == 8)


# Options that say nothing unless a GGUF file is written.
_GGUF_ONLY = ("imatrix", "pure", "output_type", "embedding_type", "tensor_types", "arch", "pre", "ollama")
# Options that say nothing beside --type.
_GRID_ONLY = ("bits", "group_size", "symmetric")
_SPELT = {"tensor_types": "tensor-type", "symmetric": "sym"}


def refuse_idle(settings: Settings, choice: Choice | None, target: Format) -> None:
    """Refuses options that were given and would do nothing.

    Raises:
        UsageError: naming the first.
    """
    usual = Settings()
    if settings.all_experts and choice is None:
        raise UsageError("--all-experts says nothing without --method", "name a method")
    if settings.all_experts and settings.statistics is not None:
        raise UsageError(
            "--all-experts has no meaning beside --statistics, whose experts see what is sent to them", "drop one"
        )
    given = [name for name in (*_GGUF_ONLY, *_GRID_ONLY) if getattr(settings, name) != getattr(usual, name)]
    for name in given:
        said = f"--{_SPELT.get(name, name.replace('_', '-'))}"
        if name in _GGUF_ONLY and not target.single_file and str(settings.imatrix) != "none":
            raise UsageError(f"{said} has no meaning for format {target.name}", "drop it, or say --format gguf")
        if name in _GRID_ONLY and (choice is None or choice.mix is not None):
            beside = f"--type {settings.type}" if settings.type else "a conversion"
            raise UsageError(f"{said} has no meaning beside {beside}", "drop it, or say --method")


# The names that people know, by method and format.
_SUFFIXES: dict[tuple[str, str], Callable[[AffineInt], str]] = {
    ("awq", "awq"): lambda scheme: "-AWQ",
    ("awq+gptq", "awq"): lambda scheme: "-AWQ-GPTQ",
}


def suffix(method: str, scheme: Scheme, target: str) -> str:
    """Returns what is appended to the model's name, such as `-AWQ` or `-RTN-Int4`."""
    assert isinstance(scheme, AffineInt)
    if isinstance(scheme, PackedInt):
        return f"{'' if method == 'rtn' else '-' + method.upper().replace('+', '-')}-W{scheme.bits}A16"
    build = _SUFFIXES.get((method, target))
    return build(scheme) if build else f"-{method.upper().replace('+', '-')}-Int{scheme.bits}"


def written(target: Format) -> list[str]:
    """Returns the schemes that a format accepts, of each family some members, computed by asking it."""
    plain = [scheme for name in ("f32", "f16", "bf16") if isinstance(scheme := parse_scheme(name), Plain)]
    readable_only = target.reject(plain[0]) is not None
    return [] if readable_only else [str(s) for s in (*_grids(), *plain) if target.reject(s) is None]


def _grids() -> list[Scheme]:
    affine: list[Scheme] = [AffineInt(bits, 128, symmetric) for bits in range(2, 9) for symmetric in (False, True)]
    return [*affine, *float_schemes.members(), *mlx_schemes.members(), *(GGMLBlock(name) for name in ENCODERS)]


def matrix() -> list[dict[str, object]]:
    """Returns one row for each method and format: the schemes that go through both, computed by asking them."""
    grids = _grids()
    rows: list[dict[str, object]] = []
    for method in method_table().values():
        for target in format_table().values():
            both = [str(g) for g in grids if method.reject(g) is None and target.reject(g) is None]
            if both:
                rows.append({"method": method.name, "format": target.name, "schemes": both})
    return rows
