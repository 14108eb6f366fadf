"""The calibrated part of a run: the model swept block by block, each block handed to the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from quantize.calib_data import CalibrationText
from quantize.calibration import open_sweep
from quantize.checkpoint import refuse_nan
from quantize.errors import InputError
from quantize.formats.base import Checkpoint
from quantize.methods.base import Block, Method, Result
from quantize.parallel import Pool
from quantize.placing import Placing
from quantize.progress import Progress
from quantize.ranks import ALONE, Ranks
from quantize.settings import Settings
from quantize.skeleton import Skeleton
from quantize.statistics import Statistics
from quantize.store import StatisticsFile
from quantize.structure import Input
from quantize.sweep import Stage
from quantize.trace import Known, Structure, trace
from quantize.turns import at_once, in_turns


@dataclass(frozen=True)
class Blockwise:
    """What is to be done to which model.

    Attributes:
        settings: The options of the run.
        skeleton: The model's modules.
        checkpoint: Its weights.
        method: The method; it calibrates.
        placing: Which tensors it makes, and where they go.
        threads: Threads of the sweep.
        folder: Where activations wait that have no room in memory.
        progress: Told how many blocks are done.
        ranks: Those that share the rows of text, and the work of the method where `pool` is theirs.
    """

    settings: Settings
    skeleton: Skeleton
    checkpoint: Checkpoint
    method: Method
    placing: Placing
    threads: int
    folder: Path
    progress: Progress
    ranks: Ranks = ALONE

    def run(self, text: CalibrationText, statistics: StatisticsFile | None, model: str, pool: Pool) -> None:
        """Makes every block that is not on disk yet.

        Args:
            text: The rows to calibrate on.
            statistics: A file to take statistics from if it exists, else to save them in; the method then sees those
                of the unquantized model.
            model: Fingerprint of the model, for that file.
            pool: Where the method works.
        """
        blocks = [path for path in self.skeleton.blocks if self.placing.names(self.skeleton.stored_names(path))]
        if statistics is not None and statistics.exists:
            self._from_file(blocks, statistics, pool)
        else:
            self._swept(blocks, text, statistics, model, pool)

    def _from_file(self, blocks: Sequence[str], statistics: StatisticsFile, pool: Pool) -> None:
        for index, path in enumerate(blocks, 1):
            names = self.skeleton.stored_names(path)
            if not self.placing.written(names):
                weights = {name: self._read(name) for name in names}
                self._make(path, weights, *statistics.read(path), pool)
            self.progress("quantizing", index, len(blocks))

    def _swept(
        self,
        blocks: Sequence[str],
        text: CalibrationText,
        statistics: StatisticsFile | None,
        model: str,
        pool: Pool,
    ) -> None:
        """Sweeps the model. Blocks on disk already are only passed through."""
        todo = [path for path in blocks if not self.placing.written(self.skeleton.stored_names(path))]
        if not todo and statistics is None:
            return
        with ExitStack() as stack:
            sweep = stack.enter_context(
                open_sweep(self.settings, self.skeleton, self.checkpoint, text, self.threads, self.folder, self.ranks)
            )
            recorded = statistics if self.ranks.first else None  # all ranks have the same
            if recorded is not None:
                matrices = (name for path in self.skeleton.blocks for name in self.skeleton.stored_names(path))
                stack.enter_context(recorded.recording(model, text.sha256, matrices))
            known: Known = {}
            for stage in sweep.stages():
                if stage.path in todo or (statistics is not None and stage.path in blocks):
                    self._scan(stage.weights)
                    structure = trace(stage, self.skeleton, known)
                    if self.method.sequential and statistics is None:
                        self._in_turns(stage, structure, pool)
                    else:
                        values = stage.run(structure.sites)
                        if recorded is not None:
                            recorded.write(stage.path, structure.inputs, values)
                        if stage.path in todo:
                            self._make(stage.path, stage.weights, structure.inputs, values, pool)
                        del values
                    todo = [path for path in todo if path != stage.path]
                elif stage.path in blocks and self.method.sequential and statistics is None:
                    stage.settle(self.placing.read_back(list(stage.weights)))
                if stage.path in blocks:
                    self.progress("quantizing", blocks.index(stage.path) + 1, len(blocks))
                if not todo and statistics is None:
                    return
            if todo:
                raise InputError(
                    f"{self.checkpoint.path}: a forward pass never entered {todo[0]}", "quantize it with --method rtn"
                )

    def _in_turns(self, stage: Stage, structure: Structure, pool: Pool) -> None:
        """Rounds a block while it is passed through again and again; its rounded weights stay loaded."""
        block = replace(self.placing.block(stage.path, stage.weights), inputs=structure.inputs)
        result = in_turns(stage, structure, block, self.method, pool, self.placing.stored, self.settings.all_experts)
        self.placing.store(block, result)

    def _make(
        self,
        name: str,
        weights: Mapping[str, Tensor],
        inputs: Sequence[Input],
        statistics: Mapping[str, Statistics],
        pool: Pool,
    ) -> None:
        block: Block = replace(self.placing.block(name, weights), inputs=inputs, statistics=statistics)
        result: Result = at_once(block, self.method, pool)
        self.placing.store(block, result)

    def _read(self, name: str) -> Tensor:
        """Returns a whole tensor, float32 where floating, checked."""
        value = self.checkpoint.read(name)
        value = value.float() if value.is_floating_point() else value
        self._scan({name: value})
        return value

    def _scan(self, weights: Mapping[str, Tensor]) -> None:
        """Refuses NaN and Inf in the source, unless they are let through."""
        if not self.settings.allow_nan:
            refuse_nan(self.checkpoint, weights)
