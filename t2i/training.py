"""The training loop: batches in, checkpoints, metrics and sample grids out.

Everything random is a function of (seed, step): the samples (`data_pipeline.loader.LaneOrder`), dropped conditions and
dropout. A resumed run therefore needs nothing but the weights, the optimizer and the step.
"""

import json
import math
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.atomic import write_bytes
from data_pipeline.index import ShardSet
from data_pipeline.loader import BatchLoader, LaneOrder, collate_codes
from data_pipeline.tolerant import TolerantSet
from t2i import checkpoint
from t2i.checkpoint import RECIPE, VOCABULARY, Inputs, Saver, newest
from t2i.config import Recipe, to_json
from t2i.engine import Engine, Runtime, broadcast_bytes
from t2i.errors import RunError
from t2i.health import Health
from t2i.inspection import Inspection, Judge
from t2i.metrics import MetricsLog
from t2i.objective import TrainingModel, build_model, condition_tensors, parameter_groups, training_flops
from t2i.optimizer import lr_at, make_optimizer
from t2i.rank_log import Progress
from t2i.reports import Window, device_peak, peak_memory
from t2i.run_checks import check_data, check_resumable, inputs_of, vocabulary_of
from t2i.text_encoder import TextEncoder
from t2i.vq import load_vq
from t2i.warm_start import match, read_weights

EXIT_SAVED = 85
"""Exit code after a signal: everything is saved, start the same command again."""

MicroBatch = tuple[Tensor, Tensor, Tensor | None]
"""Tokens [B, *grid], condition, condition mask."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after how many steps, and whether a signal stopped it before the last."""

    step: int
    stopped_by_signal: bool


class Trainer:
    """One run on one rank. Make it on every rank, which resumes from the newest whole checkpoint, then call `run`."""

    def __init__(
        self, recipe: Recipe, deepspeed_config: dict[str, Any], runtime: Runtime, judge: Judge | None = None
    ) -> None:
        """`judge` is what the first rank asks every `eval.geneval_every` steps."""
        self.recipe, self.runtime, self._judge_of_pictures = recipe, runtime, judge
        train = recipe.train
        self.shards = ShardSet(recipe.data.path)
        # A published text encoder is gigabytes: read on one rank, not on all.
        self.inputs = Inputs(
            **json.loads(broadcast_bytes(runtime, lambda: json.dumps(asdict(inputs_of(recipe, self.shards))).encode()))
        )
        check_resumable(recipe, self.inputs)
        check_data(recipe, self.shards, self.inputs)
        self.order = LaneOrder(0, len(self.shards) - recipe.data.validation, recipe.data.lanes, train.seed)
        micro_batch = deepspeed_config["train_micro_batch_size_per_gpu"]
        accumulation = deepspeed_config.get("gradient_accumulation_steps", 1)
        self.order.check(micro_batch * accumulation * runtime.ranks, runtime.ranks)
        self._files = {RECIPE: to_json(recipe).encode()}
        vocabulary = None
        if recipe.text_encoder is not None:
            vocabulary = broadcast_bytes(runtime, lambda: vocabulary_of(recipe, self.shards))
            self._files[VOCABULARY] = vocabulary
        # Read here: inside the engine, ZeRO-3 would partition the tokenizer's weights as well.
        codes_VD = load_vq(recipe.tokenizer).quantize.normalized() if train.head_init == "codebook" else None
        torch.manual_seed(train.seed)

        def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
            assert isinstance(model, TrainingModel)
            return make_optimizer(parameter_groups(model, train.weight_decay), train)

        self._build = partial(build_model, recipe, vocabulary)
        start = self._start_weights() if newest(recipe.run_dir) is None else None
        self.engine = Engine(
            runtime, partial(self._build, codes_VD), deepspeed_config, optimizer, start=start, compiled=train.compile
        )
        self.text_encoder: TextEncoder | None = self.engine.module.text_encoder
        resumed = checkpoint.resume(self.engine, recipe.run_dir)
        self.first_step = 0 if resumed is None else resumed.info.step
        self.saver = Saver(
            self.engine, recipe.run_dir, self.inputs, self._files,
            keep_last=train.keep_last, keep_every=train.keep_every, averaged=train.ema_decay > 0,
            background=train.background_save, resumed_from=None if resumed is None else resumed.folder,
        )  # fmt: skip
        self.inspection = Inspection(recipe, self.engine, self.shards, self._build, self._collate)
        self._samples: ShardSet | TolerantSet = self.shards
        if recipe.data.unreadable == "replace":
            self._samples = TolerantSet(self.shards, self.order.last, self._report_unreadable)
        self.signalled = False
        self.engine.barrier()  # ranks of one processor measure its peak while the others do
        self.peak_flops = device_peak(runtime.device, self.engine.dtype, train.peak_tflops)

    def _start_weights(self) -> dict[str, Tensor] | None:
        """Weights that a new run starts from, where it is to start from others' (`train.init_from`)."""
        source = self.recipe.train.init_from
        if source is None:
            return None
        weights = read_weights(Path(source))
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in self._build().named_parameters()}
        report = match(shapes, weights, source)
        if self.runtime.is_first:
            print(f"starting from {source}: {report}", file=sys.stderr)
        return {name: weights[name] for name in report.taken}

    # Batches

    def _micro_batches(self, samples: Sequence[Any]) -> list[MicroBatch]:
        size = self.engine.micro_batch
        return [self._collate(samples[start : start + size]) for start in range(0, len(samples), size)]

    def _collate(self, samples: Sequence[Any]) -> MicroBatch:
        batch = collate_codes(samples)
        return batch["codes"], *condition_tensors(batch, self.recipe, self.text_encoder)

    def _report_unreadable(self, number: int, error: ValueError) -> None:
        print(
            f"\nrank {self.runtime.rank} trains on another sample in place of number {number}: {error}", file=sys.stderr
        )

    def _unconditional(self, step: int) -> Tensor | None:
        """Which samples of this rank's part of a batch lose their condition: bool [batch / ranks]."""
        share = self.recipe.model.condition_dropout
        if share == 0:
            return None
        # Drawn for the global batch, so that it does not depend on the number of ranks.
        generator = torch.Generator().manual_seed(_mix(self.recipe.train.seed, step, 1))
        dropped = torch.rand(self.engine.global_batch, generator=generator) < share
        return dropped.chunk(self.runtime.ranks)[self.runtime.rank]

    # The loop

    def run(self, progress: Progress) -> Outcome:
        """Train to the last step, or until a signal, and tell `progress` of every step. Raises `RunError` for what ends the
        run on all ranks alike."""
        recipe, train, first = self.recipe, self.recipe.train, self.runtime.is_first
        step = self.first_step
        if first:
            write_bytes(recipe.run_dir / RECIPE, self._files[RECIPE])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        with (
            MetricsLog(recipe, step, enabled=first) as log,
            Health(
                recipe.run_dir, step, self.shards,
                max_bad_steps=train.max_bad_steps, spike_deviations=train.spike_deviations, enabled=first,
            ) as health,
            BatchLoader(
                self._samples, self.order, self.engine.global_batch, self.runtime.rank, self.runtime.ranks, step,
                self._micro_batches, workers=recipe.data.workers,
            ) as loader,
            tqdm(total=train.steps, initial=step, desc=recipe.name, unit="step", disable=not first) as bar,
        ):  # fmt: skip
            begun, window = time.perf_counter(), Window(lambda: loader.wait_seconds)
            while step < train.steps:
                batch_step, micro_batches = next(loader)
                assert batch_step == step, (batch_step, step)
                losses_A = self.engine.step(self._inputs(step, micro_batches), lr_at(train, step))
                step += 1
                progress.step(step)
                bar.update()
                writing, unwritten = self.saver.state()
                # DeepSpeed has waited for the gradient's norm, so the loss is there.
                stops, busy, failed, total = self.engine.sum_over_ranks(
                    [self.signalled, writing, unwritten, float(losses_A.mean())]
                )
                loss = total / self.runtime.ranks
                self._judge(health, step, loss, losses_A)
                self._saved(log, step, self.saver.advance(busy > 0, failed > 0))
                window.add(
                    None if self.engine.skipped else loss,
                    sum(training_flops(recipe, *batch) for batch in micro_batches),
                )
                if step % train.log_every == 0 or step == train.steps:
                    row = self._report(window, step, self.saver.lost_seconds / (time.perf_counter() - begun))
                    log.write(row)
                    progress.note(f"step {step}: loss {row['loss']}, {row['samples_per_s']:.1f} samples/s")
                    if row["loss"] is not None:
                        bar.set_postfix(loss=f"{row['loss']:.3f}", samples_per_s=f"{row['samples_per_s']:.0f}")
                    window = Window(lambda: loader.wait_seconds)
                if recipe.data.validation and (step % train.validate_every == 0 or step == train.steps):
                    with window.paused(), progress.busy("validating"):
                        log.write({"step": step, "val_loss": self.inspection.validation_loss()})
                if train.sample_every and (step % train.sample_every == 0 or step == train.steps):
                    with window.paused(), progress.busy("sampling"):
                        log.image(step, self.inspection.sample_grid(step))
                if recipe.eval.geneval_every and (step % recipe.eval.geneval_every == 0 or step == train.steps):
                    with window.paused(), progress.busy("judging"):
                        log.write({"step": step, **self.inspection.judged(step, self._judge_of_pictures)})
                ends = stops > 0 or step == train.steps
                if ends or step % train.save_every == 0:
                    with window.paused(), progress.busy("saving"):
                        problem = self.saver.begin(step)
                        self._saved(log, step, problem or (self.saver.finish() if ends else None), must=ends)
                if ends:
                    break
        return Outcome(step, step < train.steps)

    def _inputs(self, step: int, micro_batches: Sequence[MicroBatch]) -> list[tuple[Tensor | None, ...]]:
        """What the model is given in a step; all generators start from its seed."""
        # Dropout differs from rank to rank and from step to step, and not from run to run.
        seed = _mix(self.recipe.train.seed, step, 2 + self.runtime.rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        unconditional = self._unconditional(step)
        parts: Sequence[Tensor | None] = (
            [None] * len(micro_batches) if unconditional is None else unconditional.split(self.engine.micro_batch)
        )
        return [(*batch, part) for batch, part in zip(micro_batches, parts, strict=True)]

    def _judge(self, health: Health, step: int, loss: float, losses_A: Tensor) -> None:
        """Report a step that was left out or whose loss leaps; raise RunError after too many of the former."""
        skipped = self.engine.skipped
        kind = "skipped" if skipped else "spike" if health.is_spike(loss) else None
        if skipped:
            health.bad()
        else:
            health.good(loss)
        if kind is None:
            return
        row = health.report(step, kind, loss, self._suspects(step - 1, self.engine.gather(losses_A.tolist())))
        if self.runtime.is_first:
            print(f"\nstep {step}: {kind}, loss {loss}; its samples are in {health.path}", file=sys.stderr)
        if problem := health.problem(row):
            self.saver.finish()  # what has begun would otherwise be lost
            raise RunError(problem)

    def _suspects(self, step: int, losses_RA: Sequence[Sequence[float]]) -> list[int]:
        """Samples of the micro-batches whose loss is no finite number, of the highest loss where all are, given the losses
        of all ranks."""
        parts: list[tuple[float, np.ndarray]] = []
        for rank, losses_A in enumerate(losses_RA):
            numbers = self.order.indices(step, self.engine.global_batch, rank, self.runtime.ranks)
            parts += zip(losses_A, np.split(numbers, len(losses_A)), strict=True)
        odd = [part for loss, part in parts if not math.isfinite(loss)]
        if not odd:
            odd = [max(parts, key=lambda part: part[0])[1]] if not self.engine.skipped else [part for _, part in parts]
        return [int(number) for part in odd for number in part]

    def _saved(self, log: MetricsLog, step: int, problem: str | None, must: bool = False) -> None:
        """Deal with a checkpoint that could not be written; `must`: it was the last."""
        if problem is None:
            return
        if must or self.recipe.train.on_save_error == "stop":
            raise RunError(
                f"{problem}; whole checkpoints are as they were, and the same command goes on from the newest"
            )
        log.write({"step": step, "save_error": problem})
        if self.runtime.is_first:
            print(f"\nstep {step}: {problem}; going on (train.on_save_error is continue)", file=sys.stderr)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signalled = True
        if number == signal.SIGINT:  # whoever asks twice does not want to wait for the save
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _report(self, window: Window, step: int, save_share: float) -> dict[str, Any]:
        seconds, waited, samples = window.seconds(), window.waited(), self._samples
        replaced = samples.replaced if isinstance(samples, TolerantSet) else 0
        (unreadable,) = self.engine.sum_over_ranks([replaced])
        samples_per_s = window.steps * self.engine.global_batch / seconds
        return {
            "step": step,
            "loss": window.mean_loss(),
            "grad_norm": self.engine.gradient_norm() if not self.engine.skipped else None,
            "lr": lr_at(self.recipe.train, step - 1),
            "samples_per_s": samples_per_s,
            "tokens_per_s": samples_per_s * math.prod(self.recipe.model.grid),
            "mfu": window.flops / seconds / self.peak_flops,
            "data_wait_share": waited / seconds,
            "save_share": save_share,
            "memory_gib": self.engine.most(peak_memory(self.runtime.device)),
            "skipped_steps": self.engine.skipped_steps,
            "unreadable": int(unreadable),
            "epoch": self.order.epochs(step, self.engine.global_batch),
            "seconds_left": (self.recipe.train.steps - step) * seconds / window.steps,
        }


def _mix(*numbers: int) -> int:
    """A seed from several numbers, far apart for neighbouring ones."""
    value = 0
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) % 2**63
        value ^= value >> 29
    return value
