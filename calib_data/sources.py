"""Where text comes from: the bundled text, files, and data sets of the hub.

Everything is streamed, except a `.json` list, which has to be read whole. Only `hub:` touches the network.
"""

from __future__ import annotations

import json
import random
import re
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from quantize.calib_data.records import COLUMNS, Document, from_row
from quantize.errors import InputError

PIECE = 8192  # characters of a plain text that are one document

_BUNDLED = Path(__file__).parent / "default"
_PARTS = ("train", "eval")
_HUB = re.compile(r"hub:(?P<name>[^@:]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?")
_POOL = 1024  # documents among which a shuffled stream draws
_BATCH = 256  # parquet rows decoded at once
# The end of a run of blank lines.
_BLANK = re.compile(r"\n[^\S\n]*\n(?=[^\S\n]*\S)")


def documents(source: str, *, seed: int = 0) -> Iterator[Document]:
    """Yields the documents of a source; blank rows of a data set are left out.

    A plain text comes in pieces of at most `PIECE` characters, cut at a blank line where there is one; joined
    they are the text exactly. The bundled text is interleaved: any prefix is a fair mix of its kinds.

    Args:
        source: `default`, `default:eval`, `hub:NAME[@CONFIG][:SPLIT]` (the split is `train` if none is
            named), or a file: .jsonl, .json, .parquet, or any other name for plain text in UTF-8.
        seed: 0 keeps the order of the source. Any other number shuffles: the bundled text within each kind,
            the rows of a data set among some 1000 read ahead, a plain text not at all.

    Raises:
        InputError: the source does not exist (raised by the call itself, except for the hub), cannot be read
            or holds no text, or a row is bad.
    """
    return _with_text(source, _stored(source, seed), exact=_is_plain(source))


def read_text(source: str, *, limit: int | None = None) -> str:
    """Returns a source as one string: a plain text exactly, other documents joined by an empty line.

    Blank rows are kept, so that a data set of lines gives the text on which perplexities are usually quoted.

    Args:
        source: As in `documents`.
        limit: Stop after the document that completes this many characters; None reads everything.

    Raises:
        InputError: as in `documents`; also where a row holds token ids.
    """
    plain = _is_plain(source)
    parts: list[str] = []
    size = 0
    for document in _with_text(source, _stored(source, 0), exact=True):
        try:
            parts.append(document.plain())
        except ValueError as error:
            raise InputError(f"{source}: {error}", "name a source that holds text") from None
        size += len(parts[-1])
        if limit is not None and size >= limit:
            break
    return ("" if plain else "\n\n").join(parts)


def _stored(source: str, seed: int) -> Iterator[Document]:
    """Returns the documents as stored, blank ones too; what can be refused unread is refused at once."""
    if source == "self":
        raise InputError("'self' is written by the model, not read from a source", "name a file, hub:NAME or default")
    if source.partition(":")[0] == "default":
        return _default(source, seed)
    if source.startswith("hub:"):
        return _shuffled(_hub(source), seed)
    path = _file(source)
    reader = _READERS.get(path.suffix.lower())
    return _guarded(path, _plain(path) if reader is None else _shuffled(reader(path), seed))


def _is_plain(source: str) -> bool:
    special = source.partition(":")[0] in ("default", "hub", "self")
    return not special and Path(source).suffix.lower() not in _READERS


def _with_text(source: str, stream: Iterable[Document], *, exact: bool) -> Iterator[Document]:
    """Yields the stream, without its blank documents unless `exact`; refuses one that is all blank."""
    found = False
    for document in stream:
        if document.blank and not exact:
            continue
        found = found or not document.blank
        yield document
    if not found:
        raise InputError(f"{source}: holds no text")


def _shuffled(stream: Iterable[Document], seed: int) -> Iterator[Document]:
    """Yields the stream in another order, drawing from a pool so that only so much is read ahead."""
    if seed == 0:
        yield from stream
        return
    draw = random.Random(seed)
    pool: list[Document] = []
    for document in stream:
        if len(pool) < _POOL:
            pool.append(document)
            continue
        place = draw.randrange(_POOL)
        pool[place], document = document, pool[place]
        yield document
    draw.shuffle(pool)
    yield from pool


# The bundled text


def _default(source: str, seed: int) -> Iterator[Document]:
    part = source.partition(":")[2] if ":" in source else "train"
    if part not in _PARTS:
        raise InputError(f"{source}: the bundled text has no such part", "its parts are default and default:eval")
    kinds = bundled(part)
    if seed:
        draw = random.Random(seed)
        for kind in kinds.values():
            draw.shuffle(kind)
    return mixed(kinds)


def bundled(part: str) -> dict[str, list[Document]]:
    """Returns the bundled documents of `train` or `eval`, by kind, as stored."""
    kinds: dict[str, list[Document]] = {}
    for file in sorted((_BUNDLED / part).iterdir()):
        if file.suffix == ".jsonl":
            kinds[file.stem] = list(_jsonl(file))
        elif file.suffix == ".txt":
            texts = file.read_text(encoding="utf-8").split("\n%%\n")
            kinds[file.stem] = [Document(text=text.strip("\n")) for text in texts]
    return kinds


def mixed(kinds: Mapping[str, Iterable[Document]]) -> Iterator[Document]:
    """Yields all documents, each from the kind that has given the smallest share of its own bytes so far.

    So at any moment two kinds that are not used up differ by one document at most.
    """
    left = {kind: deque((d, len(d.plain().encode())) for d in stored) for kind, stored in kinds.items()}
    totals = {kind: sum(size for _, size in queue) for kind, queue in left.items()}
    given = dict.fromkeys(left, 0)
    left = {kind: queue for kind, queue in left.items() if queue}
    while left:
        kind = min(left, key=lambda kind: given[kind] / max(totals[kind], 1))
        document, size = left[kind].popleft()
        given[kind] += size
        if not left[kind]:
            del left[kind]
        yield document


# Files


def _file(source: str) -> Path:
    path = Path(source)
    try:
        folder = path.is_dir()
        path.stat()
    except FileNotFoundError:
        hint = "a source is a file, hub:NAME, default or default:eval"
        raise InputError(f"{source}: no such file", hint) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: {getattr(error, 'strerror', None) or error}") from error
    if folder:
        raise InputError(f"{source}: a folder, not a text", "name a file in it: .txt, .jsonl, .json, .parquet")
    return path


def _guarded(path: Path, stream: Iterator[Document]) -> Iterator[Document]:
    """Yields the stream; what goes wrong while reading becomes an error that names the file."""
    try:
        yield from stream
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {_bad_line(path)}: not valid UTF-8", "convert the file to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or _one_line(error)}") from error


def _bad_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def _plain(path: Path) -> Iterator[Document]:
    # newline="": line ends stay as they are. utf-8-sig: a byte order mark is no text.
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, piece in enumerate(pieces(file)):
            yield Document(text=piece, continues=number > 0)


def pieces(file: TextIO, size: int = PIECE) -> Iterator[str]:
    """Yields a text in pieces of 1 to `size` characters, cut where it hurts least; joined, they are it."""
    rest = ""
    while block := file.read(size):
        rest += block
        while len(rest) > size:
            cut = _cut(rest, size)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _cut(text: str, size: int) -> int:
    """Returns where to cut, 1 to `size`: after a blank line, else after a line, else before a space."""
    blank = max((match.end() for match in _BLANK.finditer(text, 0, size + 1)), default=0)
    return blank or text.rfind("\n", 0, size) + 1 or max(text.rfind(" ", 0, size), 0) or size


def _jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                where = f"{path}, line {number}"
                yield from_row(_parse_json(text, where), where)


def _json(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig") as file:
        start = next((line.lstrip() for line in file if line.strip()), "")
    if not start.startswith("["):  # rows one a line, as many data sets name them too
        yield from _jsonl(path)
        return
    for number, row in enumerate(_parse_json(path.read_text(encoding="utf-8-sig"), str(path)), 1):
        yield from_row(row, f"{path}, row {number}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = _known_columns(str(path), file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield from_row(row, f"{path}, row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a valid parquet file: {_one_line(error)}") from error


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


def _known_columns(where: str, columns: Iterable[str]) -> list[str]:
    """Returns the columns that can hold text, so that pictures and the like are never decoded."""
    names = list(columns)
    known = [name for name in names if name in COLUMNS]
    if not known:
        raise InputError(f"{where}: no text in its columns: {', '.join(names)}", f"known: {', '.join(COLUMNS)}")
    return known


# The hub


def _hub(source: str) -> Iterator[Document]:
    match = _HUB.fullmatch(source)
    if match is None:
        raise InputError(f"'{source}': names no data set", "write hub:NAME, hub:NAME@CONFIG or hub:NAME:SPLIT")
    return _hub_rows(source, match["name"], match["config"], match["split"] or "train")


def _hub_rows(source: str, name: str, config: str | None, split: str) -> Iterator[Document]:
    # Addresses, tokens and offline mode are the library's own business, and so are the many errors it raises.
    try:
        import datasets

        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        columns = rows.column_names  # None where only the rows can tell
    except Exception as error:
        raise _hub_error(source, error) from error
    if columns is not None:
        rows = rows.select_columns(_known_columns(source, columns))
    stream = iter(rows)
    for number in count(1):
        try:
            row = next(stream, None)
        except Exception as error:
            raise _hub_error(source, error) from error
        if row is None:
            return
        yield from_row(row, f"{source}, row {number}")


def _hub_error(source: str, error: Exception) -> InputError:
    hint = "check name, @CONFIG, :SPLIT and the network; a gated data set needs HF_TOKEN"
    return InputError(f"{source}: {_one_line(error)}", hint)


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
