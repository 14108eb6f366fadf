"""The job: checkpoint, plan, block by block { statistics, method, writer }, verification, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize import formats, methods
from quantize.calib_data import CalibrationText, token_rows
from quantize.checkpoint import fingerprint, is_quantized, open_checkpoint
from quantize.errors import InputError, QuantizeError, ResourceError, UsageError, resource_error
from quantize.evaluation import DEFAULT_TEXT, evaluate_checkpoints, require_windows
from quantize.formats.folder import INDEX
from quantize.methods.base import ROWS, Block, Method, Result
from quantize.parallel import Pool, default_threads, one_torch_thread, spans
from quantize.planning import Entry, Plan, Request, make_plan, require_space
from quantize.presets import Choice, choose
from quantize.progress import Progress, silent
from quantize.recipe import parse_rule, read_recipe
from quantize.report import Report, card, figures
from quantize.schemes import Plain, QuantizedTensor, Scheme, dtype_name, parse_scheme
from quantize.selftext import SELF, sample_rows
from quantize.skeleton import Skeleton
from quantize.statistics import Statistics
from quantize.store import StatisticsFile
from quantize.structure import Input
from quantize.sweep import Sweep
from quantize.tokenizer import load_tokenizer, require_rows
from quantize.trace import Known, trace
from quantize.version import VERSION
from quantize.writer import REPORT, OutputFolder, check_target, tidy

SAMPLES = 64
LENGTH = 512
EVAL_CHUNKS = 20
_PROBE_TOKENS = 32
_BATCH_TOKENS = 512
# Bytes of a plain tensor copied at a time.
_COPY = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a run; the command line's spellings are these names with dashes.

    Attributes:
        method: Name of the method; None for a plain conversion.
        bits: Code width; None for the method's own.
        group_size: Inputs per scale; None for the format's own.
        symmetric: Whether zero points are fixed to the middle.
        type: llama.cpp's name of a type or mix.
        format: Name of the format; None for the method's own.
        dtype: What plain floating tensors become; None to keep them.
        out: The output; None for a name in the current folder.
        adapters: LoRA folders, `DIR` or `DIR:SCALE`.
        calib: Calibration text sources; empty for the bundled text.
        calib_samples: Rows of calibration text.
        calib_length: Tokens per row.
        statistics: File to save statistics in, or to reuse them from if it exists.
        recipe: Recipe file.
        set: Rules `PATTERN=SCHEME`, before the file's.
        eval: Text to measure the loss on, "none", or None for the method's own.
        seed: Seed of every random choice.
        threads: Threads; None for all processors.
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
    symmetric: bool = False
    type: str | None = None
    format: str | None = None
    dtype: str | None = None
    out: str | Path | None = None
    adapters: tuple[str, ...] = ()
    calib: tuple[str, ...] = ()
    calib_samples: int = SAMPLES
    calib_length: int = LENGTH
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


class Job:
    """One run from source to output; `plan` can be had without doing anything.

    Args:
        model: The source, as `open_checkpoint` takes it.
        settings: The options.
        progress: Told how far it is.

    Raises:
        QuantizeError: whatever can be refused before the first weight is read.
    """

    def __init__(self, model: str | Path | None, settings: Settings, progress: Progress = silent) -> None:
        self.settings = replace(settings, fallback=settings.fallback and not settings.strict)
        self.progress = progress
        self.choice: Choice | None = _choice(self.settings)
        self.checkpoint = open_checkpoint(model, settings.adapters)
        self.source = _source_name(model, self.checkpoint.path)
        self.method: Method | None = methods.named(self.choice.method) if self.choice else None
        self.target = formats.named(self.choice.format if self.choice else self.settings.format or "hf")
        self._refuse_second_rounding()
        self.skeleton = Skeleton(self.checkpoint, settings.assume_tied)
        self.out = _output(settings.out if settings.out is not None else self._default_name())
        self.threads = settings.threads or default_threads()
        plan = make_plan(self.checkpoint, self.skeleton, self._request(), self.out)
        self.plan = replace(plan, refusal=self._refusal(plan))

    def run(self) -> Report:
        """Does it.

        Returns:
            The report; the output stands under its final name.

        Raises:
            QuantizeError: with the kinds and exit codes of `quantize.errors`. What was done is kept for the next
                run after `ResourceError` and interrupts, and removed after the others.
        """
        tidy(self.out)
        if self.plan.refusal is not None:
            raise self.plan.refusal
        self._require_evaluation_text()
        text = self._calibration_text()
        statistics = StatisticsFile(self.settings.statistics) if self.settings.statistics else None
        identity = self._identity(text)
        if statistics is not None and self._calibrates:
            statistics.require(identity["model"], text.sha256 if text else "")
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        output = OutputFolder(self.out, self.plan.files, digest, self.settings.restart)
        try:
            with one_torch_thread():
                report = self._fill(output, text, statistics, identity)
            output.publish(self.settings.overwrite)
        except (KeyboardInterrupt, ResourceError):
            output.close()
            raise
        except BaseException as error:
            starved = resource_error(error)
            if starved is None:
                output.discard()
                raise
            output.close()
            raise starved from error
        return report

    @cached_property
    def _entry(self) -> Mapping[str, Entry]:
        """The plan's entries by name."""
        return {entry.name: entry for entry in self.plan.entries}

    def _base_name(self) -> str:
        """Returns what figures compare with; a quantized source is compared with what it reads back as."""
        bits: dict[str, int] = {}
        for info in self.checkpoint.tensors.values():
            if not isinstance(info.scheme, Plain):
                bits[str(info.scheme)] = bits.get(str(info.scheme), 0) + info.nbytes
        return f"{self.source}, dequantized from {max(bits, key=bits.__getitem__).upper()}" if bits else self.source

    @property
    def _calibrates(self) -> bool:
        return self.method is not None and self.method.calibrates

    def _fill(
        self,
        output: OutputFolder,
        text: CalibrationText | None,
        statistics: StatisticsFile | None,
        identity: Mapping[str, Any],
    ) -> Report:
        self._copy_plain(output)
        with Pool(self.threads) as pool:
            for block, result in self._results(output, text, statistics, identity, pool):
                self._store(output, block, result)
                del block, result  # they would wait in memory while the next ones are made
        record = self._records(output)
        heard = text.notices if text is not None else ()
        notes = (*self.plan.notices, *heard, *(note for row in record.values() for note in row["notes"]))
        local = [note for row in record.values() for note in row["notes"]]
        if self.settings.strict and (local or self.plan.fallbacks):
            first = local[0] if local else f"{self.plan.fallbacks[0].name} {self.plan.fallbacks[0].rule}"
            raise UsageError(f"--strict: {first}", "allow it, or exclude the tensor by a rule")
        output.verify()
        report = Report(
            out=self.out,
            source=self.source,
            base=self._base_name(),
            method=self.method.name if self.method else None,
            format=self.target.name,
            settings=self._recorded_settings(text),
            figures=figures(self.plan, sum(i.nbytes for i in self.checkpoint.tensors.values())),
            notes=notes,
            errors={name: error for row in record.values() for name, error in sorted(row["errors"].items())},
            files=self._file_names(),
        )
        self._side_files(output, report)
        source = self._eval_source()
        if source is not None:
            report = replace(report, quality=self._evaluate(output, report, source))
            self._side_files(output, report)
        return report

    # -- what is computed ------------------------------------------------------------------------------------------

    def _results(
        self,
        output: OutputFolder,
        text: CalibrationText | None,
        statistics: StatisticsFile | None,
        identity: Mapping[str, Any],
        pool: Pool,
    ) -> Iterator[tuple[Block, Result]]:
        """Yields every block that is not on disk yet, with what the method made of it."""
        if self.method is None:
            return
        if not self._calibrates:
            todo = [e for e in self.plan.quantized if not self._written(output, [e])]
            for index, entry in enumerate(todo, 1):
                yield self._made(entry.name, {entry.name: self._read(entry.name)}, (), {}, pool)
                self.progress("quantizing", index, len(todo))
            return
        blocks = [path for path in self.skeleton.blocks if self._entries_of(path)]
        if statistics is not None and statistics.exists:
            for index, path in enumerate(blocks, 1):
                if not self._written(output, self._entries_of(path)):
                    weights = {n: self._read(n) for n in self.skeleton.stored_names(path)}
                    yield self._made(path, weights, *statistics.read(path), pool)
                    del weights
                self.progress("quantizing", index, len(blocks))
            return
        assert text is not None
        yield from self._swept(output, text, statistics, identity, pool, blocks)

    def _made(
        self,
        name: str,
        weights: Mapping[str, Tensor],
        inputs: Sequence[Input],
        statistics: Mapping[str, Statistics],
        pool: Pool,
    ) -> tuple[Block, Result]:
        """Returns one block and what the method makes of it. Its callers keep no weights alive while they wait."""
        assert self.method is not None
        block = replace(self._block(name, weights), inputs=inputs, statistics=statistics)
        return block, self.method.quantize(block, pool)

    def _swept(
        self,
        output: OutputFolder,
        text: CalibrationText,
        statistics: StatisticsFile | None,
        identity: Mapping[str, Any],
        pool: Pool,
        blocks: Sequence[str],
    ) -> Iterator[tuple[Block, Result]]:
        """Yields the blocks of a calibration sweep. Blocks on disk already are only passed through."""
        assert self.method is not None
        todo = [path for path in blocks if not self._written(output, self._entries_of(path))]
        if not todo and statistics is None:
            return
        batches = list(torch.split(text.ids, max(1, _BATCH_TOKENS // text.ids.shape[1])))
        with ExitStack() as stack:
            sweep = stack.enter_context(
                Sweep(
                    self.skeleton,
                    self.checkpoint,
                    batches,
                    threads=self.threads,
                    probe=text.ids[:1, :_PROBE_TOKENS],
                    budget=self.settings.activation_budget,
                    folder=output.path,
                )
            )
            if statistics is not None:
                matrices = (name for path in self.skeleton.blocks for name in self.skeleton.stored_names(path))
                stack.enter_context(statistics.recording(identity["model"], text.sha256, matrices))
            known: Known = {}
            for stage in sweep.stages():
                if stage.path in todo or (statistics is not None and stage.path in blocks):
                    self._scan(stage.weights)
                    structure = trace(stage, self.skeleton, known)
                    values = stage.run(structure.sites)
                    if statistics is not None:
                        statistics.write(stage.path, structure.inputs, values)
                    if stage.path in todo:
                        yield self._made(stage.path, stage.weights, structure.inputs, values, pool)
                        todo.remove(stage.path)
                    del values
                if stage.path in blocks:
                    self.progress("quantizing", blocks.index(stage.path) + 1, len(blocks))
                if not todo and statistics is None:
                    return
            if todo:
                raise InputError(
                    f"{self.checkpoint.path}: a forward pass never entered {todo[0]}", "quantize it with --method rtn"
                )

    def _block(self, name: str, weights: Mapping[str, Tensor]) -> Block:
        """Returns the block made of these stored tensors; those on disk already are left out of its schemes."""
        entries = {e.name: e for e in map(self._entry.get, weights) if e is not None}
        dtypes = {n: e.scheme.dtype if isinstance(e.scheme, Plain) else torch.float32 for n, e in entries.items()}
        return Block(name, weights, dtypes, {n: e.scheme for n, e in entries.items() if e.quantized})

    def _read(self, name: str) -> Tensor:
        value = self.checkpoint.read(name)
        value = value.float() if value.is_floating_point() else value
        self._scan({name: value})
        return value

    def _scan(self, weights: Mapping[str, Tensor], start: int = 0) -> None:
        """Refuses NaN and Inf in the source, naming file, tensor, place and number; the first row is `start`."""
        if self.settings.allow_nan:
            return
        for name, value in weights.items():
            if not _finite(value):
                bad = (~value.float().isfinite()).nonzero()
                first = bad[0].tolist()
                place = [first[0] + start, *first[1:]] if first else "its only value"
                raise InputError(
                    f"{self.checkpoint.file(name)}: tensor '{name}' holds {len(bad)} NaN or Inf, first at {place}",
                    "download it again; --allow-nan lets it through",
                )

    # -- what is written -------------------------------------------------------------------------------------------

    def _copy_plain(self, output: OutputFolder) -> None:
        """Writes every tensor that no method changes, a run of rows at a time."""
        touched = self._touched()
        plain = [e for e in self.plan.entries if not e.quantized and e.name not in touched]
        todo = [e for e in plain if e.name not in output.done]
        for index, entry in enumerate(todo, 1):
            zeroed: list[int] = []
            output.put_parts(entry.name, self._parts(entry, zeroed))
            if note := _zeroed_note(entry, sum(zeroed)):
                output.record(entry.name, {"notes": [note], "errors": {}})
            if index % 32 == 0 or index == len(todo) or entry.count > _COPY:
                output.commit()
            self.progress("copying", index, len(todo))

    def _touched(self) -> frozenset[str]:
        """Plain tensors that a calibrating method may change: those of the blocks that it works on."""
        if not self._calibrates:
            return frozenset()
        return frozenset(
            name for path in self.skeleton.blocks if self._entries_of(path) for name in self.skeleton.stored_names(path)
        )

    def _parts(self, entry: Entry, zeroed: list[int]) -> Iterator[Tensor]:
        """Yields a plain tensor in its output dtype, a run of rows at a time, and counts what becomes 0 by the cast."""
        length = entry.shape[0] if entry.shape else 1
        rows = max(1, _COPY // max(1, 4 * entry.count // max(1, length)))
        for start in range(0, length, rows):
            part = self.checkpoint.read(entry.name, start, start + rows)
            self._scan({entry.name: part}, start)
            cast = self._cast(entry, part)
            zeroed.append(_zeroed(part, cast))
            yield cast

    def _cast(self, entry: Entry, value: Tensor) -> Tensor:
        """Returns a plain value in its output dtype.

        Raises:
            InputError: a finite value would become Inf.
        """
        assert isinstance(entry.scheme, Plain)
        if value.dtype == entry.scheme.dtype:
            return value
        result = value.to(entry.scheme.dtype)
        if result.is_floating_point() and bool((result.isinf() & value.isfinite()).any()):
            raise InputError(
                f"tensor '{entry.name}' has values beyond {dtype_name(entry.scheme.dtype)}", "use --dtype bf16"
            )
        return result

    def _store(self, output: OutputFolder, block: Block, result: Result) -> None:
        """Writes all tensors of one block and makes them durable together with the block's record."""
        by_name = {e.name: e for e in map(self._entry.get, block.weights) if e is not None}
        errors: dict[str, float] = {}
        notes = list(result.notes)
        for name, entry in by_name.items():
            if entry.quantized:
                coded = result.coded[name]
                output.put(self.target.pack(name, coded))
                errors[name] = self._error(block, result, name, coded)
            else:
                value = result.changed.get(name, block.weights[name])
                cast = self._cast(entry, value)
                output.put({name: cast})
                if note := _zeroed_note(entry, _zeroed(value, cast)):
                    notes.append(note)
        output.record(block.name, {"notes": notes, "errors": errors})
        output.commit()

    @staticmethod
    def _error(block: Block, result: Result, name: str, coded: QuantizedTensor) -> float:
        """Returns |Q - W|^2 / |W|^2, W being what was rounded: the weight after folds."""
        weight = result.targets.get(name, block.weights[name])
        lost = whole = 0.0
        for start, stop in spans(len(weight), ROWS):
            part = weight[start:stop]
            lost += float((coded.rows(start, stop).dequantize() - part).square_().sum())
            whole += float(part.square().sum())
        return lost / max(whole, 1e-30)

    def _records(self, output: OutputFolder) -> dict[str, dict[str, Any]]:
        return dict(sorted(output.records.items()))

    def _side_files(self, output: OutputFolder, report: Report) -> None:
        config = deepcopy(self.checkpoint.config)
        linears = {e.name: e.scheme for e in self.plan.entries if e.quantized or _maybe_linear(e)}
        block = self.target.quantization_config(linears) if self.plan.quantized else {}
        nested = config.get("text_config")
        for holder in (config, nested) if isinstance(nested, dict) else (config,):
            holder["tie_word_embeddings"] = self.skeleton.head_tied
        if block:
            config["quantization_config"] = block
        dtypes = [e.scheme.dtype for e in self.plan.entries if isinstance(e.scheme, Plain)]
        if self.settings.dtype is not None or is_quantized(self.checkpoint):
            config.pop("torch_dtype", None)
            config["dtype"] = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
        original = self.checkpoint.side_files.get("README.md")
        text = original.read_text(encoding="utf-8", errors="replace") if original else None
        written = {
            "config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            "README.md": card(report, text),
            REPORT: report.to_json(),
        }
        index = output.index()
        if index is not None:
            written[INDEX] = index
        output.write_side_files(self.checkpoint.side_files, written)

    def _file_names(self) -> tuple[str, ...]:
        """Returns the names of all files of the output."""
        index = [INDEX] if len(self.plan.files) > 1 else []
        return tuple(
            sorted({*self.plan.files, *index, *self.checkpoint.side_files, "config.json", "README.md", REPORT})
        )

    def _evaluate(self, output: OutputFolder, report: Report, source: str) -> dict[str, Any]:
        result = evaluate_checkpoints(
            formats.find(output.path).open(output.path),
            self.checkpoint,
            names=(self.out.name, report.base),
            text=source,
            chunks=EVAL_CHUNKS,
            threads=self.threads,
            assume_tied=self.settings.assume_tied,
            progress=self.progress,
        )
        value = result.to_dict()
        value.pop("chunks")
        value["protocol"] = {**value["protocol"], "text": _without_folder(value["protocol"]["text"])}
        return value

    # -- what is decided -------------------------------------------------------------------------------------------

    def _request(self) -> Request:
        rules = [parse_rule(text, "--set") for text in self.settings.set]
        if self.settings.recipe is not None:
            rules += read_recipe(Path(self.settings.recipe))
        return Request(
            scheme=self.choice.scheme if self.choice else None,
            method=self.method,
            format=self.target,
            rules=rules,
            dtype=_dtype(self.settings.dtype),
            fallback=self.settings.fallback,
            samples=self.settings.calib_samples,
            length=self.settings.calib_length,
            threads=self.threads,
            activation_budget=self.settings.activation_budget,
        )

    def _refusal(self, plan: Plan) -> QuantizeError | None:
        """Returns why what lies on the disk forbids the run, or None."""
        settings = self.settings
        adapters = (text if Path(text).exists() else text.rpartition(":")[0] for text in settings.adapters)
        files = (settings.recipe, settings.statistics, settings.eval, *settings.calib, *adapters)
        sources = [self.checkpoint.path, *(path for file in files if file and (path := Path(file)).exists())]
        try:
            check_target(self.out, sources, settings.overwrite)
            require_space(plan, OutputFolder.reserved_bytes(self.out))
        except QuantizeError as error:
            return error
        return None

    def _require_evaluation_text(self) -> None:
        """Refuses a text that the loss cannot be measured on, before the work and not after it."""
        source = self._eval_source()
        if source is not None:
            require_windows(self.checkpoint, source, EVAL_CHUNKS)

    def _refuse_second_rounding(self) -> None:
        if self.choice is not None and is_quantized(self.checkpoint) and not self.settings.requantize:
            kinds = {str(i.scheme) for i in self.checkpoint.tensors.values() if not isinstance(i.scheme, Plain)}
            raise InputError(
                f"{self.checkpoint.path}: already quantized ({', '.join(sorted(kinds))}); rounding twice loses more",
                "start from the original, or say --requantize",
            )

    def _default_name(self) -> str:
        name = self.source.split("@")[0].rsplit("/", 1)[-1]
        name = Path(name).stem if self.checkpoint.path.is_file() else name
        return name + (self.choice.suffix if self.choice else f"-{self.settings.format or 'hf'}")

    def _entries_of(self, path: str) -> list[Entry]:
        """Returns the entries that the method makes for a block: nothing, if nothing of it is quantized."""
        entries = [self._entry[name] for name in self.skeleton.stored_names(path)]
        return entries if any(entry.quantized for entry in entries) else []

    def _written(self, output: OutputFolder, entries: Sequence[Entry]) -> bool:
        return all(
            piece.name in output.done
            for entry in entries
            for piece in self.target.pieces(entry.name, entry.shape, entry.scheme)
        )

    def _eval_source(self) -> str | None:
        wanted = self.settings.eval or ("default" if self._calibrates else "none")
        if wanted == "none":
            return None
        return DEFAULT_TEXT if wanted == "default" else wanted

    def _calibration_text(self) -> CalibrationText | None:
        if not self._calibrates:
            return None
        sources = self.settings.calib or ("default",)
        if "none" in sources:
            raise UsageError(
                f"method {self.choice.method if self.choice else ''} needs calibration text", "drop --calib none"
            )
        text = self._mixed_rows(tuple(sources))
        require_rows(text.ids, self.skeleton, self.checkpoint)
        return text

    def _mixed_rows(self, sources: tuple[str, ...]) -> CalibrationText:
        """Returns the rows of all sources, row r from source r % n; those of `self` are sampled from the model."""
        count, length, seed = self.settings.calib_samples, self.settings.calib_length, self.settings.seed
        tokenizer = load_tokenizer(self.checkpoint)
        if SELF not in sources:
            return token_rows(sources, tokenizer, rows=count, length=length, seed=seed)
        own = [row for row in range(count) if sources[row % len(sources)] == SELF]
        with one_torch_thread():
            sampled = sample_rows(
                self.skeleton, self.checkpoint, tokenizer,
                rows=len(own), length=length, seed=seed, progress=self.progress,
            )  # fmt: skip
        others = tuple(source for source in sources if source != SELF)
        notices: tuple[str, ...] = ()
        special = int(torch.isin(sampled, torch.tensor(tokenizer.all_special_ids)).sum())
        ids = torch.empty(count, length, dtype=torch.int64)
        ids[own] = sampled
        if others:
            rest = token_rows(others, tokenizer, rows=count - len(own), length=length, seed=seed)
            ids[[row for row in range(count) if row not in set(own)]] = rest.ids
            special, notices = special + rest.special_tokens, rest.notices
        return CalibrationText(ids, sources, hashlib.sha256(ids.numpy().tobytes()).hexdigest(), special, notices)

    def _identity(self, text: CalibrationText | None) -> dict[str, Any]:
        """Returns everything that decides the output's bytes."""
        return {
            "version": VERSION,
            "torch": torch.__version__,
            "model": fingerprint(self.checkpoint),
            "plan": [(e.name, str(e.scheme)) for e in self.plan.entries],
            "settings": self._recorded_settings(text),
            "eval": self._eval_source(),
        }

    def _recorded_settings(self, text: CalibrationText | None) -> dict[str, Any]:
        settings = self.settings
        used = sorted({str(entry.scheme) for entry in self.plan.quantized})
        record: dict[str, Any] = {"scheme": ", ".join(used) if used else "none", "version": VERSION}
        if text is not None:
            record |= {
                "calibration": ", ".join(map(_without_folder, text.sources)),
                "calibration_rows": f"{text.ids.shape[0]} x {text.ids.shape[1]} tokens",
                "calibration_sha256": text.sha256,
            }
        if settings.adapters:
            record["adapters"] = [Path(adapter).name for adapter in settings.adapters]
        rules = [*settings.set, *([Path(settings.recipe).name] if settings.recipe else [])]
        return record | ({"rules": rules} if rules else {}) | {"seed": settings.seed}


def _choice(settings: Settings) -> Choice | None:
    """Returns what is to be done to the linears, or None for a plain conversion."""
    if settings.method is None and settings.type is None and settings.format == "hf":
        return None
    return choose(
        settings.method, settings.bits, settings.group_size, settings.symmetric, settings.format, settings.type
    )


def _finite(value: Tensor) -> bool:
    """Returns whether no element is NaN or Inf, by the extremes: NaN shows in both, and no mask of all is made."""
    if not value.is_floating_point() or not value.numel():
        return True
    value = value.float() if value.dtype.itemsize == 1 else value
    return all(bool(extreme.isfinite()) for extreme in value.aminmax())


def _maybe_linear(entry: Entry) -> bool:
    """Returns whether an engine might take a kept tensor for a linear: towers, projectors, routers, kept blocks."""
    matrix = len(entry.shape) == 2 and entry.name.endswith(".weight")
    return matrix and entry.rule not in ("copied: embedding", "copied: head")


def _zeroed(before: Tensor, after: Tensor) -> int:
    """Returns how many values a cast made zero."""
    if before.dtype == after.dtype or not before.is_floating_point():
        return 0
    return int(((after == 0) & (before != 0)).sum())


def _zeroed_note(entry: Entry, count: int) -> str | None:
    return f"{entry.name}: {count} values too small for {entry.scheme} became 0" if count else None


def _output(path: str | Path) -> Path:
    """Returns the output's path with a name of its own: `.` and `..` have none."""
    path = Path(path).expanduser()
    return path if path.name not in ("", "..") else path.resolve()


def _without_folder(source: str) -> str:
    """Returns a text source as reports name it: a file without where it lies."""
    return Path(source).name if Path(source).exists() else source


def _source_name(model: str | Path | None, path: Path) -> str:
    """Returns a hub id, else the name of the folder or file: reports must not differ by where things lie."""
    if model is not None and not Path(model).expanduser().exists():
        return str(model).removeprefix("hub:")
    path = path.resolve()
    if path.parent.name == "snapshots":  # of the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return path.name


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    scheme: Scheme = parse_scheme(name)
    if not isinstance(scheme, Plain) or not scheme.holds_weights:
        raise UsageError(f"--dtype {name} is no floating type of 16 bits or more", "choose f32, f16 or bf16")
    return scheme.dtype
