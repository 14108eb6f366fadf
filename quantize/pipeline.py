"""The job: checkpoint, plan, block by block { statistics, method, writer }, verification, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from quantize import formats, methods
from quantize.anatomy import Anatomy, ModuleAnatomy, NamedAnatomy
from quantize.blockwise import Blockwise
from quantize.calib_data import CalibrationText
from quantize.calibration import calibration_text
from quantize.checkpoint import fingerprint, is_quantized, open_checkpoint
from quantize.errors import InputError, QuantizeError, ResourceError, UsageError, resource_error
from quantize.evaluation import DEFAULT_TEXT, evaluate_checkpoints, require_windows
from quantize.formats.base import Checkpoint, NamedView
from quantize.formats.folder import INDEX
from quantize.formats.gguf.imatrix import read_imatrix, write_imatrix
from quantize.gathering import gather_importance
from quantize.kernels.cpu.ggml import Warming
from quantize.methods.base import Method
from quantize.mixing import Mixing, is_gguf, plain_mix
from quantize.ollama import modelfile
from quantize.parallel import Pool, few_heaps, one_torch_thread
from quantize.peaks import with_peaks
from quantize.placing import OwnNames, SameNames
from quantize.planning import SHARD_BYTES, Entry, Plan, Request, make_plan, require_space
from quantize.presets import Choice, choose, refuse_idle
from quantize.progress import Progress, silent
from quantize.ranks import ALONE, Ranks
from quantize.recipe import parse_rule, read_recipe
from quantize.report import Report, card, figures
from quantize.schemes import GGMLBlock, Plain, Scheme, parse_scheme
from quantize.settings import Settings
from quantize.skeleton import Skeleton
from quantize.store import StatisticsFile
from quantize.version import VERSION
from quantize.work import Work
from quantize.writer import REPORT, OutputFolder, check_target, tidy

EVAL_CHUNKS = 20
# Options of methods.
_ROUNDING = ("damping", "shrinkage", "act_order", "descent")
# File systems take 255 bytes, and names grow while the output is made.
_LONGEST_NAME = 230
# Where an unfinished run keeps the importance that it has gathered.
_GATHERED = ".gathered-imatrix"


class Job:
    """One run from source to output; `plan` can be had without doing anything.

    Args:
        model: The source, as `open_checkpoint` takes it.
        settings: The options.
        progress: Told how far it is.
        ranks: Those that run it together, each with a job of its own.

    Raises:
        QuantizeError: whatever can be refused before the first weight is read.
    """

    def __init__(
        self, model: str | Path | None, settings: Settings, progress: Progress = silent, ranks: Ranks = ALONE
    ) -> None:
        self.ranks = ranks
        self.settings = replace(settings, fallback=settings.fallback and not settings.strict)
        self.progress = progress
        self.choice: Choice | None = _choice(self.settings)
        self.checkpoint = open_checkpoint(model, settings.adapters)
        self.source = _source_name(model, self.checkpoint.path)
        self.method = _method(self.choice, self.settings)
        self.target = formats.named(self.choice.format if self.choice else self.settings.format or "hf")
        refuse_idle(self.settings, self.choice, self.target)
        self._refuse_second_rounding()
        self.view = self.target.view(self.checkpoint, settings.arch, settings.assume_tied)
        self.out = _output(settings.out if settings.out is not None else self._default_name())
        self.threads = settings.threads or ranks.threads
        self.mix: Mixing | None = None
        if self.target.single_file:
            self.mix = Mixing.of(self.target, self.choice, self._named_view, self.settings, _dtype(settings.dtype))
        plan = make_plan(self.view, self._anatomy(), self._request(), self.out)
        self.plan = replace(plan, refusal=self._refusal(plan))

    def run(self) -> Report:
        """Does it.

        Returns:
            The report; the output stands under its final name.

        Raises:
            QuantizeError: with the kinds and exit codes of `quantize.errors`. What was done is kept for the next
                run after `ResourceError` and interrupts, and removed after the others.
        """
        with self.ranks.together():
            self.ranks.from_first(self._admit)  # only the first sees the disk as it was before any had begun
            few_heaps()
            with self._loops():
                return self._run()

    def _admit(self) -> None:
        """Refuses what lies on the disk, and tidies up what a killed run has left."""
        tidy(self.out)
        if self.plan.refusal is not None:
            raise self.plan.refusal

    def _run(self) -> Report:
        self._require_evaluation_text()
        text = self.ranks.from_first(self._calibration_text)
        statistics = StatisticsFile(self.settings.statistics) if self.settings.statistics else None
        identity = self._identity(text)
        if statistics is not None and self._calibrates:
            statistics.require(identity["model"], text.sha256 if text else "")
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        loose = self.target.single_file
        output = OutputFolder(self.out, self.plan.layouts, digest, self.settings.restart, loose, self.ranks)
        try:
            with self.ranks.together():  # all know of an error before the output is removed
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

    @contextmanager
    def _loops(self) -> Iterator[None]:
        """Compiles the loops of the types that are needed while everything else goes on, where they never were."""
        types = {e.scheme.type for e in self.plan.quantized if isinstance(e.scheme, GGMLBlock) and not e.copied}
        self._warming = Warming(types if self.ranks.first else ())
        try:
            yield
        finally:
            self._warming.stop()

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model's modules. Building them takes seconds, so what can do without does."""
        return Skeleton(self.checkpoint, self.settings.assume_tied)

    def _base_name(self) -> str:
        """Returns what figures compare with; a quantized source is compared with what it reads back as."""
        bits: dict[str, int] = {}
        for info in self.checkpoint.tensors.values():
            if not isinstance(info.scheme, Plain):
                bits[str(info.scheme)] = bits.get(str(info.scheme), 0) + info.nbytes
        return f"{self.source}, dequantized from {max(bits, key=bits.__getitem__).upper()}" if bits else self.source

    @property
    def _calibrates(self) -> bool:
        """Whether this run passes text through the model."""
        return self._sweeps or (self.mix is not None and self.mix.gathers)

    @property
    def _sweeps(self) -> bool:
        """Whether the method sees the model block by block."""
        return self.method is not None and self.method.calibrates

    def _fill(
        self,
        output: OutputFolder,
        text: CalibrationText | None,
        statistics: StatisticsFile | None,
        identity: Mapping[str, Any],
    ) -> Report:
        plan = with_peaks(self.plan, self.view)
        work = Work(plan, self.view, output, self.settings.allow_nan, self.progress, self.ranks)
        work.copy(self._touched())
        with Pool(self.threads) as pool:
            if self._sweeps:
                assert text is not None
                self._wait_for_loops()
                self._blockwise(work, text, statistics, identity["model"], self.ranks.spread(pool))
                if self.target.ends:
                    work.encode(pool, {})
            if self.mix is not None:
                importance = self._importance(output, text)
                self._wait_for_loops()
                work.encode(pool, importance)
            elif self.method is not None and not self._sweeps:
                self._nearest(work, pool)
        record = work.records()
        heard = text.notices if text is not None else ()
        learnt = self.mix.notes if self.mix is not None else ()
        notes = (*self.plan.notices, *heard, *learnt, *(note for row in record.values() for note in row["notes"]))
        local = [note for row in record.values() for note in row["notes"]]
        if self.settings.strict and (local or self.plan.fallbacks):
            first = local[0] if local else f"{self.plan.fallbacks[0].name} {self.plan.fallbacks[0].rule}"
            raise UsageError(f"--strict: {first}", "allow it, or exclude the tensor by a rule")
        output.verify()
        report = Report(
            out=self._opened_by,
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

    def _wait_for_loops(self) -> None:
        if names := self._warming.names:
            what = f"compiling {', '.join(names)} (first use on this machine)"
            self.progress(what, 0, 1)
            self._warming.wait()
            self.progress(what, 1, 1)
        self.ranks.agree()  # the others load what the first has compiled

    # -- what is computed ------------------------------------------------------------------------------------------

    def _importance(self, output: OutputFolder, text: CalibrationText | None) -> Mapping[str, Tensor]:
        """Returns the importance of each tensor's input columns: read, or gathered once and kept for a next run."""
        assert self.mix is not None
        if text is None or not self.mix.gathers:
            return self.mix.means
        kept = output.path / _GATHERED
        if self.ranks.from_first(kept.exists):
            matrix = read_imatrix(kept)
        else:
            matrix = gather_importance(
                self.settings,
                self.skeleton,
                self.checkpoint,
                self._named_view,
                text,
                self.threads,
                output.path,
                self.progress,
                self.ranks,
            )
            if self.ranks.first:
                write_imatrix(kept, matrix)
            if self.mix.save is not None and self.ranks.first:
                write_imatrix(self.mix.save, matrix)
        return self.mix.accept(matrix, self.view)

    def _nearest(self, work: Work, pool: Pool) -> None:
        """Makes every tensor by a method that needs no text."""
        method = self.method
        assert method is not None
        if self.target.by_rows and method.name == "rtn":  # a run of rows at a time: less memory
            work.encode(pool, {})
            return
        todo = [e for e in self.plan.quantized if not work.written([e])]
        work.make_each(todo, lambda block: method.quantize(block, pool))

    def _blockwise(
        self, work: Work, text: CalibrationText, statistics: StatisticsFile | None, model: str, pool: Pool
    ) -> Collection[str]:
        """Makes the tensors that a calibrating method makes, and returns their names."""
        assert self.method is not None
        placing: SameNames | OwnNames
        if self.mix is None:
            placing = SameNames(work, partial(self._reopened, work.output))
        else:
            placing = OwnNames(work, self.checkpoint, self._view_of, self.method, partial(self._reopened, work.output))
        blockwise = Blockwise(
            self.settings,
            self.skeleton,
            self.checkpoint,
            self.method,
            placing,
            self.threads,
            work.output.path,
            self.progress,
            self.ranks,
        )
        blockwise.run(text, statistics, model, pool)
        return placing.entries if isinstance(placing, OwnNames) else ()

    def _reopened(self, output: OutputFolder) -> Checkpoint:
        """Returns what is there of an unfinished output as a checkpoint."""
        if not self.target.single_file:
            output.write_side_files({}, {"config.json": self._config(), **self._index(output)})
        return self.target.open(output.path)

    def _view_of(self, checkpoint: Checkpoint) -> NamedView:
        return cast(NamedView, self.target.view(checkpoint, self.settings.arch, self.settings.assume_tied))

    def _entries_of(self, path: str) -> list[Entry]:
        """Returns the entries of a block: nothing, if nothing of it is quantized."""
        by_name = {entry.name: entry for entry in self.plan.entries}
        entries = [by_name[name] for name in self.skeleton.stored_names(path)]
        return entries if any(entry.quantized for entry in entries) else []

    def _touched(self) -> frozenset[str]:
        """Plain tensors that a calibrating method may change: those of the blocks that it works on."""
        if self.mix is not None or not self._calibrates:
            return frozenset()
        return frozenset(
            name for path in self.skeleton.blocks if self._entries_of(path) for name in self.skeleton.stored_names(path)
        )

    # -- what is written -------------------------------------------------------------------------------------------

    def _side_files(self, output: OutputFolder, report: Report) -> None:
        """Writes what is no weights: the report, and for a folder config, tokenizer and card."""
        if self.target.single_file:
            written = {self._report_name: report.to_json()}
            if self.settings.ollama:
                written[f"{self._opened_by.name}.Modelfile"] = modelfile(self._opened_by.name, self.checkpoint)
            output.write_side_files({}, written)
            return
        original = self.checkpoint.side_files.get("README.md")
        text = original.read_text(encoding="utf-8", errors="replace") if original else None
        written = {
            "config.json": self._config(),
            "README.md": card(report, text),
            REPORT: report.to_json(),
            **self._index(output),
        }
        if block := self._quantization():
            written |= dict.fromkeys(self.target.config_copies, json.dumps(block, indent=2) + "\n")
        output.write_side_files(self.checkpoint.side_files, written)

    def _quantization(self) -> dict[str, Any]:
        """Returns the block of config.json that says what is quantized, and how."""
        linears = {e.name: e.scheme for e in self.plan.entries if e.quantized or _maybe_linear(e)}
        return self.target.quantization_config(linears) if self.plan.quantized else {}

    def _config(self) -> str:
        """Returns the text of the output's config.json."""
        config = deepcopy(self.checkpoint.config)
        block = self._quantization()
        nested = config.get("text_config")
        for holder in (config, nested) if isinstance(nested, dict) else (config,):
            holder["tie_word_embeddings"] = self.skeleton.head_tied
        dtypes = [e.scheme.dtype for e in self.plan.entries if isinstance(e.scheme, Plain)]
        if self.settings.dtype is not None or is_quantized(self.checkpoint):
            config.pop("torch_dtype", None)
            config["dtype"] = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
        return json.dumps(self.target.configured(config, block), indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def _index(output: OutputFolder) -> dict[str, str]:
        """Returns the text of the shard index by its name; nothing where there is one file."""
        index = output.index()
        return {} if index is None else {INDEX: index}

    @property
    def _opened_by(self) -> Path:
        """What the output is opened by: the folder, the file, or the first of its parts."""
        return self.out.with_name(next(iter(self.plan.files))) if self.target.single_file else self.out

    @property
    def _report_name(self) -> str:
        """The report in a folder, or beside a file."""
        return f"{self.out.stem}.{REPORT}" if self.target.single_file else REPORT

    def _file_names(self) -> tuple[str, ...]:
        """Returns the names of all files of the output."""
        if self.target.single_file:
            return self._loose_names(self.plan)
        index = [INDEX] if len(self.plan.files) > 1 else []
        copies = self.target.config_copies if self.plan.quantized else ()
        return tuple(
            sorted({*self.plan.files, *index, *copies, *self.checkpoint.side_files, "config.json", "README.md", REPORT})
        )

    def _loose_names(self, plan: Plan) -> tuple[str, ...]:
        """Returns the names of the files that lie in the output's folder beside others."""
        modelfiles = [f"{next(iter(plan.files))}.Modelfile"] if self.settings.ollama else []
        return (*plan.files, self._report_name, *modelfiles)

    def _evaluate(self, output: OutputFolder, report: Report, source: str) -> dict[str, Any]:
        result = evaluate_checkpoints(
            self.target.open(output.path),
            self.checkpoint,
            names=(self.out.name, report.base),
            text=source,
            chunks=EVAL_CHUNKS,
            threads=self.threads,
            assume_tied=self.settings.assume_tied,
            progress=self.progress,
            ranks=self.ranks,
        )
        value = result.to_dict()
        value.pop("chunks")
        value["protocol"] = {**value["protocol"], "text": _without_folder(value["protocol"]["text"])}
        return value

    # -- what is decided -------------------------------------------------------------------------------------------

    @property
    def _named_view(self) -> NamedView:
        """The view; only formats with names of their own, which are files, have one of this kind."""
        return cast(NamedView, self.view)

    def _anatomy(self) -> Anatomy:
        if self.mix is None:
            return ModuleAnatomy(self.skeleton, self.checkpoint)
        if self.mix.gathers:
            _ = self.skeleton  # what cannot be built is refused now
        return NamedAnatomy({name: self._named_view.sources(name) for name in self.view.tensors})

    def _request(self) -> Request:
        rules = [parse_rule(text, "--set") for text in self.settings.set]
        if self.settings.recipe is not None and not is_gguf(self.settings.recipe):
            rules += read_recipe(Path(self.settings.recipe))
        unsplit = SHARD_BYTES if self.mix is None else 2**62
        if self.settings.split_size is not None and self.settings.split_size < 1:
            raise UsageError("--split-size must be at least 1 byte", "say a size such as 2GB, or drop it")
        return Request(
            scheme=self.choice.scheme if self.choice else None,
            method=self.method,
            format=self.target,
            rules=rules,
            decisions=self.mix.decisions if self.mix is not None else None,
            header=self.mix.header if self.mix is not None else self.target.header(self.view, {}),
            dtype=_dtype(self.settings.dtype),
            fallback=self.settings.fallback,
            samples=self.settings.calib_samples,
            length=self.settings.calib_length,
            threads=self.threads,
            activation_budget=self.settings.activation_budget,
            shard_bytes=self.settings.split_size or unsplit,
            gathers=self.mix is not None and self.mix.gathers,
        )

    def _refusal(self, plan: Plan) -> QuantizeError | None:
        """Returns why what lies on the disk forbids the run, or None."""
        settings = self.settings
        adapters = (text if Path(text).exists() else text.rpartition(":")[0] for text in settings.adapters)
        files = (settings.recipe, settings.statistics, settings.imatrix, settings.eval, *settings.calib, *adapters)
        sources = [self.checkpoint.path, *(path for file in files if file and (path := Path(file)).exists())]
        sources += [self.checkpoint.file(name) for name in self.checkpoint.tensors] if plan.format.single_file else []
        beside = self._loose_names(plan) if plan.format.single_file else ()
        try:
            check_target(self.out, dict.fromkeys(sources), settings.overwrite, beside)
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
        if self.target.single_file:
            mix = self.choice.mix if self.choice is not None else None
            return f"{name}-{(mix or plain_mix(self.view, _dtype(self.settings.dtype))).name}.gguf"
        return name + (self.choice.suffix if self.choice else f"-{self.settings.format or 'hf'}")

    def _eval_source(self) -> str | None:
        wanted = self.settings.eval or ("default" if self._calibrates else "none")
        if wanted == "none":
            return None
        return DEFAULT_TEXT if wanted == "default" else wanted

    def _calibration_text(self) -> CalibrationText | None:
        if not self._calibrates:
            return None
        return calibration_text(self.settings, self.skeleton, self.checkpoint, self.progress)

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
                "calibration_special_tokens": text.special_tokens,
                "calibration_sha256": text.sha256,
            }
        if settings.adapters:
            record["adapters"] = [Path(adapter).name for adapter in settings.adapters]
        rules = [*settings.set, *([Path(settings.recipe).name] if settings.recipe else [])]
        return record | ({"rules": rules} if rules else {}) | {"seed": settings.seed}


def _choice(settings: Settings) -> Choice | None:
    """Returns what is to be done to the linears, or None for a plain conversion."""
    if settings.method is None and settings.type is None and settings.format in ("hf", "gguf"):
        return None
    return choose(
        settings.method, settings.bits, settings.group_size, settings.symmetric, settings.format, settings.type
    )


def _method(choice: Choice | None, settings: Settings) -> Method | None:
    """Returns the method with the options that were given."""
    asked = {name: value for name in _ROUNDING if (value := getattr(settings, name)) is not None}
    if choice is None:
        if asked:
            raise UsageError(f"--{next(iter(asked)).replace('_', '-')} says nothing without --method", "name a method")
        return None
    method = methods.named(choice.method, asked)
    if settings.all_experts and not method.sequential:
        raise UsageError(f"--all-experts has no meaning for method {method.name}", "it is for gptq")
    return method


def _maybe_linear(entry: Entry) -> bool:
    """Returns whether an engine might take a kept tensor for a linear: towers, projectors, routers, kept blocks."""
    matrix = len(entry.shape) == 2 and entry.name.endswith(".weight")
    return matrix and entry.rule not in ("copied: embedding", "copied: head")


def _output(path: str | Path) -> Path:
    """Returns the output's path with a name of its own: `.` and `..` have none."""
    path = Path(path).expanduser()
    if len(path.name.encode()) > _LONGEST_NAME:
        raise UsageError(f"--out: a name of {len(path.name.encode())} bytes", f"take {_LONGEST_NAME} or less")
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
