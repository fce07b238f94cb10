"""The training loop: batches in, checkpoints, metrics and sample grids out.

Everything random is a function of (seed, step): the samples (`data_pipeline.loader.LaneOrder`), dropped conditions and
dropout. A resumed run therefore needs nothing but the weights, the optimizer and the step.
"""

import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.atomic import write_bytes
from data_pipeline.index import ShardSet
from data_pipeline.loader import LaneOrder
from t2i import checkpoint
from t2i.batches import Batches
from t2i.checkpoint import RECIPE, VOCABULARY, Inputs, Saver, newest_for_all
from t2i.config import Recipe, to_json
from t2i.engine import Engine, Runtime, broadcast_bytes
from t2i.errors import RunError
from t2i.health import Health
from t2i.inspection import Inspection, Judge
from t2i.metrics import MetricsLog
from t2i.objective import TrainingModel, build_model, parameter_groups, training_flops
from t2i.optimizer import lr_at, make_optimizer
from t2i.rank_log import Progress
from t2i.reports import Window, device_peak, peak_memory
from t2i.run_checks import check_data, check_resumable, inputs_of, vocabulary_of
from t2i.vq import load_vq
from t2i.warm_start import match, read_weights

EXIT_SAVED = 85
"""Exit code after a signal: everything is saved, start the same command again."""


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
        self.recipe, self.runtime = recipe, runtime
        train = recipe.train
        self.shards = ShardSet(recipe.data.path)
        # A published text encoder is gigabytes: read on one rank, not on all.
        self.inputs = Inputs(
            **json.loads(broadcast_bytes(runtime, lambda: json.dumps(asdict(inputs_of(recipe, self.shards))).encode()))
        )
        found = newest_for_all(runtime, recipe.run_dir)
        if found is not None:
            check_resumable(recipe, self.inputs, found)
        check_data(recipe, self.shards, self.inputs)
        self.order = LaneOrder(0, len(self.shards) - recipe.data.validation, recipe.data.lanes, train.seed)
        micro_batch = deepspeed_config["train_micro_batch_size_per_gpu"]
        accumulation = deepspeed_config.get("gradient_accumulation_steps", 1)
        self.order.check(micro_batch * accumulation * runtime.ranks, runtime.ranks)
        self._files = {RECIPE: to_json(recipe).encode()}
        vocabulary = None
        if recipe.text_encoder is not None:
            vocabulary = broadcast_bytes(runtime, lambda: vocabulary_of(recipe, self.shards, found))
            self._files[VOCABULARY] = vocabulary
        # Read here: inside the engine, ZeRO-3 would partition the tokenizer's weights as well.
        codes_VD = load_vq(recipe.tokenizer).quantize.normalized() if train.head_init == "codebook" else None
        torch.manual_seed(train.seed)

        def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
            assert isinstance(model, TrainingModel)
            return make_optimizer(parameter_groups(model, train.weight_decay), train)

        self._build = partial(build_model, recipe, vocabulary)
        start = self._start_weights(deepspeed_config["zero_optimization"]["stage"]) if found is None else None
        self.engine = Engine(
            runtime, partial(self._build, codes_VD), deepspeed_config, optimizer, start=start, compiled=train.compile
        )
        self.saver = Saver(
            self.engine, recipe.run_dir, self.inputs, self._files,
            keep_last=train.keep_last, keep_every=train.keep_every, averaged=train.ema_decay > 0,
            background=train.background_save, resumed_from=None if found is None else found.folder,
        )  # fmt: skip
        self.first_step, self._inspected, self.unreadable = 0, True, 0
        """`unreadable`: samples in whose place this rank trained on others; the first counts those before a restart."""
        if found is not None:
            checkpoint.resume(self.engine, found)
            self.first_step, self._inspected = found.info.step, found.info.inspected
            self.unreadable = found.info.unreadable if runtime.is_first else 0
        self.batches = Batches(recipe, self.shards, self.order, self.engine)
        self.inspection = Inspection(
            recipe, self.engine, self.batches.all_samples, self._build, self.batches.collate, judge
        )
        self.signalled = False
        self.engine.barrier()  # ranks of one processor measure its peak while the others do
        self.peak_flops = device_peak(runtime.device, self.engine.dtype, train.peak_tflops)

    def _start_weights(self, stage: int) -> dict[str, Tensor] | None:
        """Weights that a new run starts from, where it is to start from others' (`train.init_from`)."""
        source = self.recipe.train.init_from
        if source is None:
            return None
        if stage == 3 and not self.runtime.is_first:
            return {}  # which has them from the first
        weights = read_weights(Path(source))
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in self._build().named_parameters()}
        report = match(shapes, weights, source)
        if self.runtime.is_first:
            print(f"starting from {source}: {report}", file=sys.stderr)
        return {name: weights[name] for name in report.taken}

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
            self.batches.loader(step) as loader,
            tqdm(total=train.steps, initial=step, desc=recipe.name, unit="step", disable=not first) as bar,
        ):  # fmt: skip
            if not self._inspected:
                self.inspection.look(step, self.inspection.due(step) - self.inspection.made(step, log), log, progress)
            begun, window = time.perf_counter(), Window(lambda: loader.wait_seconds)
            while step < train.steps:
                batch_step, micro_batches = next(loader)
                assert batch_step == step, (batch_step, step)
                losses_A = self.engine.step(self.batches.inputs(step, micro_batches), lr_at(train, step))
                self.unreadable += self.batches.replaced(step)
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
                # Whoever sends a signal may not wait for long: what is due then is made up for by the next start.
                due, last = self.inspection.due(step), step == train.steps
                inspected = not due or not stops or last
                if due and inspected:
                    with window.paused():
                        self.inspection.look(step, due, log, progress)
                if stops or last or step % train.save_every == 0:
                    with window.paused(), progress.busy("saving"):
                        self._save(log, step, inspected, last=stops > 0 or last)
                if stops or last:
                    break
        return Outcome(step, step < train.steps)

    def _save(self, log: MetricsLog, step: int, inspected: bool, last: bool) -> None:
        """Begin a checkpoint, and with the last one wait until it is whole."""
        earlier = self.saver.finish()
        if not last:
            self._saved(log, step, earlier)
        (unreadable,) = self.engine.sum_over_ranks([self.unreadable])
        problem = self.saver.begin(step, inspected, int(unreadable))
        if last:
            problem = problem or self.saver.finish()
        self._saved(log, step, problem, must=last)
        if last and earlier is not None:
            self._report_unsaved(log, step, earlier)  # this one is there, so that nothing is lost

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
        row = health.report(step, kind, loss, self.batches.suspects(step - 1, losses_A.tolist()))
        if self.runtime.is_first:
            print(f"\nstep {step}: {kind}, loss {loss}; its samples are in {health.path}", file=sys.stderr)
        if problem := health.problem(row):
            self.saver.finish()  # what has begun would otherwise be lost
            raise RunError(problem)

    def _saved(self, log: MetricsLog, step: int, problem: str | None, must: bool = False) -> None:
        """Deal with a checkpoint that could not be written; `must`: it was the last."""
        if problem is None:
            return
        if must or self.recipe.train.on_save_error == "stop":
            raise RunError(
                f"{problem}; whole checkpoints are as they were, and the same command goes on from the newest"
            )
        self._report_unsaved(log, step, problem)

    def _report_unsaved(self, log: MetricsLog, step: int, problem: str) -> None:
        log.write({"step": step, "save_error": problem})
        if self.runtime.is_first:
            print(f"\nstep {step}: {problem}; going on", file=sys.stderr)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signalled = True
        if number == signal.SIGINT:  # whoever asks twice does not want to wait for the save
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _report(self, window: Window, step: int, save_share: float) -> dict[str, Any]:
        seconds, waited = window.seconds(), window.waited()
        (unreadable,) = self.engine.sum_over_ranks([self.unreadable])
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
