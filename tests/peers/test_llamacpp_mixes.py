"""The types of every mix against `llama-quantize --dry-run`, tensor by tensor.

Run as a program, it writes the golden file that the other tests compare with.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from mix_models import MODELS, NAMES, Model, brief, cases, quantized

from quantize.formats.gguf.mixes import MIXES, Choice, choose
from quantize.formats.gguf.overrides import parse_tensor_types

PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[2] / ".peers"))
PROGRAM = Path(os.environ.get("QUANTIZE_LLAMA_CPP", PEERS / "llamacpp/bin")).absolute() / "llama-quantize"
GOLDEN = Path(__file__).parents[1] / "formats/mixes.json"

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PROGRAM.exists(), reason=f"no {PROGRAM}: run 'make peers' or set QUANTIZE_LLAMA_CPP"),
]

_LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = *(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?")


def write_model(path: Path, model: Model) -> Path:
    """Writes a model's header, vectors as float32 and all else as bfloat16; its data is a hole in the file."""
    writer, facts = gguf.GGUFWriter(path, model.facts.architecture), model.facts
    values: dict[str, int | float] = {
        "block_count": facts.layers,
        "context_length": 512,
        "embedding_length": model.shapes["token_embd.weight"][1],
        "vocab_size": model.shapes["token_embd.weight"][0],
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    values |= {"attention.head_count": facts.heads, "attention.head_count_kv": facts.kv_heads} if facts.heads else {}
    values |= {"expert_count": facts.experts} if facts.experts else {}
    for key, value in (values | model.keys).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{facts.architecture}.{key}", value)
    size = 0
    for name, shape in model.shapes.items():
        kind = gguf.GGMLQuantizationType.F32 if len(shape) < 2 else gguf.GGMLQuantizationType.BF16
        nbytes = math.prod(shape) * (4 if len(shape) < 2 else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float16), nbytes, kind)
        size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + size + 32)
    return path


def write_importance(path: Path) -> Path:
    """Writes importance data in the older format, one value for a tensor that is nowhere: rules ask no more."""
    path.write_bytes(struct.pack("<ii1siif", 1, 1, b"x", 1, 1, 1.0))
    return path


def program(model: Path, mix: str, *options: object) -> dict[str, str]:
    """Returns the types that llama-quantize gives the tensors, in lower case."""
    command = [str(word) for word in (PROGRAM, "--dry-run", *options, model, mix)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = {name: (new or old).lower() for name, old, new in _LINE.findall(done.stdout + done.stderr)}
    assert done.returncode == 0, (command, (done.stdout + done.stderr)[-1500:])
    return found


def spelt(shapes: dict[str, tuple[int, ...]], choices: dict[str, Choice]) -> dict[str, str]:
    """Returns the chosen types, with those of kept tensors as `write_model` stored them."""
    return {name: choice.type or ("f32" if len(shapes[name]) < 2 else "bf16") for name, choice in choices.items()}


def differences(model: Model, found: dict[str, str], choices: dict[str, Choice]) -> list[str]:
    """Returns a line for each tensor that has another type in the program."""
    ours = spelt(model.shapes, choices)
    assert found.keys() == ours.keys()
    return [f"{name}: {ours[name]}, llama.cpp {found[name]}" for name in found if found[name] != ours[name]]


@pytest.fixture(scope="module")
def importance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_importance(tmp_path_factory.mktemp("importance") / "x.dat")


def refuses(model: Model, mix: str) -> bool:
    """Returns whether llama-quantize ends with an error: it knows no way out for rows that do not fit Q1_0."""
    return mix == "Q1_0" and any(
        shape[-1] % 128 for name, shape in model.shapes.items() if len(shape) > 1 and "ssm_conv1d" not in name
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_mix_is_that_of_llama_quantize(name: str, tmp_path: Path, importance: Path) -> None:
    model = MODELS[name]
    path = write_model(tmp_path / "model.gguf", model)
    for mix in NAMES:
        for given in (False, True):
            if refuses(model, mix):
                continue
            choices = choose(MIXES[mix], model.shapes, model.facts, importance=given)
            found = program(path, mix, *(("--imatrix", importance) if given else ()))
            assert differences(model, found, choices) == [], (mix, given)


@pytest.mark.parametrize(
    "options",
    [
        ["--pure"],
        ["--leave-output-tensor"],
        ["--output-tensor-type", "q5_K"],
        ["--token-embedding-type", "q3_K"],
        ["--output-tensor-type", "q8_0", "--token-embedding-type", "q4_0"],
        ["--tensor-type", r"attn_v=q4_k", "--tensor-type", r"blk\.[13]\.ffn_down=Q2_K"],
        ["--tensor-type", r"blk\.0\.=q8_0", "--tensor-type", "_norm=q8_0", "--tensor-type", "token=q6_k"],
        ["--pure", "--tensor-type", "attn_k=iq4_xs"],
        ["--token-embedding-type", "iq3_xxs", "--output-tensor-type", "iq2_s"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["llama, tied, 3 share", "mixtral, 8 experts, 4 share", "gemma3n"])
@pytest.mark.parametrize("mix", ["Q4_K_M", "Q3_K_M", "IQ2_M", "Q5_0", "MXFP4_MOE"])
def test_options_are_those_of_llama_quantize(
    mix: str, name: str, options: Sequence[str], tmp_path: Path, importance: Path
) -> None:
    model, words = MODELS[name], iter(options)
    asked: dict[str, str] = {}
    rules, flags = "", set()
    for word in words:
        if word in ("--pure", "--leave-output-tensor"):
            flags.add(word)
        elif word == "--tensor-type":
            rules += f"{next(words)} "
        else:
            asked[word] = next(words).lower()
    choices = choose(
        MIXES[mix],
        model.shapes,
        model.facts,
        importance=True,
        pure="--pure" in flags,
        leave_output="--leave-output-tensor" in flags,
        output=asked.get("--output-tensor-type"),
        embedding=asked.get("--token-embedding-type"),
        overrides=parse_tensor_types(rules),
    )
    found = program(write_model(tmp_path / "model.gguf", model), mix, "--imatrix", importance, *options)
    assert differences(model, found, choices) == []


def golden(folder: Path) -> dict[str, dict[str, str]]:
    """Returns what the program gives in every case, in short: model, then types to the mixes that give them.

    A mix with a `+` is one with importance.
    """
    importance = write_importance(folder / "x.dat")
    paths = {name: write_model(folder / f"{i}.gguf", model) for i, (name, model) in enumerate(MODELS.items())}
    result: dict[str, dict[str, str]] = {name: {} for name in MODELS}
    for name, mix, given in cases():
        if not refuses(MODELS[name], mix):
            types = program(paths[name], mix, *(("--imatrix", importance) if given else ()))
            short = brief(quantized(MODELS[name].shapes, types))
            result[name][short] = f"{result[name].get(short, '')} {mix}{'+' * given}".lstrip()
    return result


def test_the_golden_file_is_what_the_program_gives(tmp_path: Path) -> None:
    assert json.loads(GOLDEN.read_text(encoding="utf-8")) == golden(tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(golden(Path(scratch)), indent=0) + "\n", encoding="utf-8")
