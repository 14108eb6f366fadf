"""A model's chat templates, from the places where they are kept."""

from __future__ import annotations

import json
import string
from pathlib import PurePosixPath
from typing import Any

from quantize.errors import InputError
from quantize.formats.gguf.metadata import Value, text, texts
from quantize.formats.gguf.side_files import SideFiles

_FOLDER = "additional_chat_templates"
_ALLOWED = set(string.ascii_letters + string.digits)


def chat_templates(files: SideFiles) -> dict[str, Value]:
    """Returns the header's keys for the chat templates.

    A name that several places give is taken from the first of: `chat_template.jinja` and
    `additional_chat_templates/NAME.jinja`, which transformers prefers; `tokenizer_config.json`;
    `chat_template.json`. Where another place says something else, a notice is left with the files.
    """
    found: dict[str, tuple[str, str]] = {}
    for place, name, template in _places(files):
        first, taken = found.setdefault(name, (place, template))
        if taken.strip() != template.strip():
            of = "" if name == "default" else f" '{name}'"
            files.notices.append(f"two chat templates{of}: taken from {first}, another in {place}")
    values = {"tokenizer.chat_template": text(found.pop("default")[1])} if "default" in found else {}
    named = {"".join(c if c in _ALLOWED else "_" for c in name): held for name, (_, held) in found.items()}
    if named:
        values["tokenizer.chat_templates"] = texts(named)
    return values | {f"tokenizer.chat_template.{name}": text(held) for name, held in named.items()}


def _places(files: SideFiles) -> list[tuple[str, str, str]]:
    """Returns place, name and text of every template, the preferred places first."""
    found = []
    if (held := files.text("chat_template.jinja")) is not None:
        found.append(("chat_template.jinja", "default", held))
    for name in sorted(files.files):
        path = PurePosixPath(name)
        if path.parent.name == _FOLDER and path.suffix == ".jinja" and (held := files.text(name)) is not None:
            found.append((name, path.stem, held))
    found += _listed("tokenizer_config.json", files.settings.get("chat_template"))
    if (held := files.text("chat_template.json")) is not None:
        try:
            value = json.loads(held)
        except ValueError as error:
            raise InputError(f"{files.files['chat_template.json']}: no JSON: {error}") from error
        found += _listed("chat_template.json", value.get("chat_template") if isinstance(value, dict) else value)
    return found


def _listed(place: str, value: Any) -> list[tuple[str, str, str]]:
    """Returns the templates of a JSON value: one text, a list of names and texts, or an object of them."""
    if isinstance(value, str):
        return [(place, "default", value)]
    if isinstance(value, dict):
        return [(place, name, held) for name, held in value.items() if isinstance(held, str)]
    entries = value if isinstance(value, list) else []
    return [
        (place, entry["name"], entry["template"])
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    ]
