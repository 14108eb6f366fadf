"""Linears that engines fuse when they load a model, and what they call the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# vLLM's and SGLang's, by the name of the fused module: its parts must be quantized alike.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def fused_modules(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Returns the fused modules that some linears form, each with those of its parts that are there (two or more).

    Args:
        modules: Module names, such as `model.layers.0.self_attn.q_proj`.
    """
    present = dict.fromkeys(modules)
    found: dict[str, tuple[str, ...]] = {}
    for name, leaves in FUSED.items():
        for module in present:
            if module.endswith(f".{leaves[0]}"):
                stem = module.removesuffix(leaves[0])
                parts = tuple(stem + leaf for leaf in leaves if stem + leaf in present)
                if len(parts) > 1:
                    found[stem + name] = parts
    return found


def fused_tensors(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the same as groups of tensor names, such as `model.layers.0.self_attn.q_proj.weight`."""
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return [tuple(f"{part}.weight" for part in parts) for parts in fused_modules(modules).values()]
