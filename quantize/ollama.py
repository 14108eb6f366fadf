"""A Modelfile: what Ollama must be told of a GGUF file beyond what it reads from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quantize.formats.base import Checkpoint

# Turns as the template of Ollama writes them, by a marker that gives the chat template away. Ollama reads no Jinja:
# a template that it does not recognise is replaced by the bare prompt.
_TURNS = {
    "<|im_start|>": (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        ("<|im_end|>",),
    ),
    "<|start_header_id|>": (
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|eot_id|>",),
    ),
    "<start_of_turn>": (
        '{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user{{ end }}\n'
        "{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n",
        ("<end_of_turn>",),
    ),
}
_SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "repetition_penalty": "repeat_penalty"}  # fmt: skip


def modelfile(name: str, checkpoint: Checkpoint) -> str:
    """Returns the text of a Modelfile for the GGUF file `name` that lies beside it.

    Args:
        name: The file, or the first of its parts.
        checkpoint: The source, for its chat template and generation settings.
    """
    lines = [f"# ollama create NAME -f {name}.Modelfile", f"FROM ./{name}"]
    template = _chat_template(checkpoint)
    for marker, (turns, stops) in _TURNS.items():
        if marker in template:
            lines += [f'TEMPLATE """{turns}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
            break
    settings = _side_json(checkpoint, "generation_config.json")
    lines += [f"PARAMETER {ours} {settings[theirs]}" for theirs, ours in _SAMPLING.items() if settings.get(theirs)]
    return "\n".join(lines) + "\n"


def _chat_template(checkpoint: Checkpoint) -> str:
    file = checkpoint.side_files.get("chat_template.jinja")
    if file is not None:
        return file.read_text(encoding="utf-8", errors="replace")
    return str(_side_json(checkpoint, "tokenizer_config.json").get("chat_template", ""))


def _side_json(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    file = checkpoint.side_files.get(name)
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except ValueError:
        value = {}
    return value if isinstance(value, dict) else {}
