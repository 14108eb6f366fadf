"""The options of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SAMPLES = 64
LENGTH = 512


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a run; the command line's spellings are these names with dashes.

    Attributes:
        method: Name of the method; None for a plain conversion.
        bits: Code width; None for the method's own.
        group_size: Inputs per scale; None for the format's own.
        symmetric: Whether zero points are fixed to the middle; None for the method's and format's own.
        type: llama.cpp's name of a type or mix; then the format is GGUF.
        imatrix: Importance of input columns: "auto" (gathered where the types need it or a text is named), "none", or a
            file of llama.cpp's, read if it exists and saved if it does not. None means auto.
        pure: Whether a mix gives every tensor its base type.
        output_type: Type of the output matrix, over the mix.
        embedding_type: Type of the token embedding, over the mix.
        tensor_types: Rules `REGEX=TYPE` in llama.cpp's syntax, or files of them, after `set` and `recipe`.
        arch: GGUF's name of the architecture, where it cannot be told.
        pre: llama.cpp's name of how the tokenizer splits text, where it cannot be told.
        format: Name of the format; None for the method's own.
        dtype: What plain floating tensors become; None to keep them.
        split_size: The largest weight file, in bytes; None for the format's own (5 GB, or all in one for GGUF).
        ollama: Whether a Modelfile for Ollama is written beside a GGUF file.
        out: The output; None for a name in the current folder.
        adapters: LoRA folders, `DIR` or `DIR:SCALE`.
        calib: Calibration text sources; empty for the bundled text.
        calib_samples: Rows of calibration text.
        calib_length: Tokens per row.
        damping: Share of the Hessian's mean diagonal that gptq adds to its diagonal; None for the method's own.
        shrinkage: How far gptq draws the Hessian towards its diagonal, 0 to 1; None for the method's own.
        act_order: Order in which gptq rounds columns: "blocks", "columns" or "none"; None for the method's own.
        descent: Rounds of coordinate descent after gptq's feedback; None for the method's own.
        all_experts: Whether every token goes to every expert while a method gathers what it needs.
        statistics: File to save statistics in, or to reuse them from if it exists.
        recipe: Recipe file.
        set: Rules `PATTERN=SCHEME`, before the file's.
        eval: Text to measure the loss on, "none", or None for the method's own.
        seed: Seed of every random choice.
        threads: Threads, of each worker where there are several; None for all processors, evenly.
        activation_budget: Bytes of waiting activations kept in memory.
        requantize: Whether a quantized source may be quantized again.
        assume_tied: Whether a missing head is the embedding.
        allow_nan: Whether NaN and Inf in weights are let through.
        overwrite: Whether an existing output is replaced.
        restart: Whether an unfinished run is dropped instead of continued.
        fallback: Whether another group or no quantization may stand in where a shape forbids what was asked.
        strict: Whether any local fallback is an error; implies `fallback=False`.
    """

    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    type: str | None = None
    imatrix: str | Path | None = None
    pure: bool = False
    output_type: str | None = None
    embedding_type: str | None = None
    tensor_types: tuple[str, ...] = ()
    arch: str | None = None
    pre: str | None = None
    format: str | None = None
    dtype: str | None = None
    split_size: int | None = None
    ollama: bool = False
    out: str | Path | None = None
    adapters: tuple[str, ...] = ()
    calib: tuple[str, ...] = ()
    calib_samples: int = SAMPLES
    calib_length: int = LENGTH
    damping: float | None = None
    shrinkage: float | None = None
    act_order: str | None = None
    descent: int | None = None
    all_experts: bool = False
    statistics: str | Path | None = None
    recipe: str | Path | None = None
    set: tuple[str, ...] = ()
    eval: str | None = None
    seed: int = 0
    threads: int | None = None
    activation_budget: int = 2**31
    requantize: bool = False
    assume_tied: bool = False
    allow_nan: bool = False
    overwrite: bool = False
    restart: bool = False
    fallback: bool = True
    strict: bool = False
