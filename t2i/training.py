"""The training loop: batches in, checkpoints, metrics and sample grids out.

Everything random is a function of (seed, step): the samples (`data_pipeline.loader.LaneOrder`), dropped conditions and
dropout. A resumed run therefore needs nothing but the weights, the optimizer and the step.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.atomic import write_bytes
from data_pipeline.index import ShardSet
from data_pipeline.loader import BatchLoader, LaneOrder, collate_codes
from data_pipeline.verify import STATES
from t2i import checkpoint
from t2i.animation import film_strips
from t2i.beats import Progress
from t2i.checkpoint import RECIPE, VOCABULARY, Inputs
from t2i.config import Recipe, TrainConfig, to_json
from t2i.engine import Engine, Runtime, broadcast_bytes
from t2i.metrics import MetricsLog
from t2i.objective import TrainingModel, build_model, condition_tensors, parameter_groups
from t2i.optimizer import make_optimizer
from t2i.pipeline import Provenance, TextToImagePipeline, picture_grid
from t2i.text_encoder import TextEncoder, text_encoder_sha256, train_sentencepiece
from t2i.vq import VQModel, load_vq, vq_sha256

EXIT_SAVED = 85
"""Exit code after a signal: everything is saved, start the same command again."""
VOCABULARY_CAPTIONS = 50_000
"""Captions, from the start of the set, that a trained text encoder's vocabulary is made from."""

MicroBatch = tuple[Tensor, Tensor, Tensor | None]
"""Tokens [B, *grid], condition, condition mask."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after how many steps, and whether a signal stopped it before the last."""

    step: int
    stopped_by_signal: bool


def lr_at(train: TrainConfig, step: int) -> float:
    """Learning rate of a step (0-based): linear warm-up, then a cosine to `min_lr` at the last step."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def inputs_of(recipe: Recipe, shards: ShardSet) -> Inputs:
    """Checksums of what a run is given. Reads the whole tokenizer and frozen text encoder, so once a run is enough."""
    frozen = recipe.frozen_text_encoder
    return Inputs(shards.manifest.digest, vq_sha256(recipe.tokenizer), text_encoder_sha256(frozen) if frozen else None)


def check_data(recipe: Recipe, shards: ShardSet, inputs: Inputs) -> None:
    """Raise ValueError unless the shards are what the recipe trains on: kind, grid, codebook, tokenizer, and a class or
    text states in every sample where the recipe needs them."""
    path, manifest, encoding = recipe.data.path, shards.manifest, shards.manifest.encoding
    if encoding is None:
        raise ValueError(f"{path} holds raw pictures; encode it first: t2i encode {path} --out FOLDER")
    expected: dict[str, Any] = {
        "grid": list(recipe.model.grid),
        "codebook_size": recipe.model.vocab_size,
        "image_size": recipe.image_size,
        "tokenizer_sha256": inputs.tokenizer,
    }
    if inputs.text_encoder is not None:
        if lacking := manifest.lacking(STATES):
            raise ValueError(
                f"recipe {recipe.name} trains on stored text states, and {lacking:,} of {len(shards):,} samples in {path} "
                f"have none; encode the set with `t2i encode --text-encoder {recipe.frozen_text_encoder}`"
            )
        expected["text_encoder_sha256"] = inputs.text_encoder
    for name, value in expected.items():
        found = encoding.get(name)
        if (list(found) if name == "grid" and found else found) != value:
            raise ValueError(
                f"{path} was encoded with {name} {found} and recipe {recipe.name} needs {value}; encode it for this recipe"
            )
    if recipe.model.condition == "class" and (lacking := manifest.lacking("cls")):
        raise ValueError(
            f"recipe {recipe.name} is class-conditional, and {lacking:,} of {len(shards):,} samples in {path} have no .cls "
            "member; give each one a class (`t2i data ingest --label-field` for a table) and encode the set again"
        )
    if len(shards) - recipe.data.validation < recipe.data.lanes:
        raise ValueError(
            f"{path} has {len(shards)} samples, {recipe.data.validation} of them for validation, too few for "
            f"{recipe.data.lanes} lanes; set data.lanes or data.validation lower"
        )
    if recipe.frozen_text_encoder is not None:
        states_LX = shards.read_encoded(0, (STATES,)).states
        assert states_LX is not None, "every sample has states"
        if states_LX.shape[1] != recipe.model.condition_dim:
            raise ValueError(
                f"{path} holds text states of {states_LX.shape[1]} channels and recipe {recipe.name} takes "
                f"{recipe.model.condition_dim}; set model.condition_dim to {states_LX.shape[1]}, the width of "
                f"{recipe.frozen_text_encoder}"
            )


def check_resumable(recipe: Recipe, inputs: Inputs) -> None:
    """Raise ValueError where the run folder has checkpoints of another model, of other data, or of another order of it."""
    found = checkpoint.newest(recipe.run_dir)
    if found is None:
        return
    earlier = found.recipe()

    def fixed(r: Recipe, given: Inputs) -> dict[str, Any]:
        # Things are compared by what is in them, not by the place where they are.
        return {
            "model": r.model, "text_encoder": r.text_encoder, "frozen_text_encoder": given.text_encoder,
            "tokenizer": given.tokenizer, "image_size": r.image_size, "data.path": given.data,
            "data.lanes": r.data.lanes, "data.validation": r.data.validation, "train.seed": r.train.seed,
            "train.ema_decay": r.train.ema_decay,
        }  # fmt: skip

    before = fixed(earlier, found.info.inputs)
    differs = [name for name, value in fixed(recipe, inputs).items() if value != before[name]]
    if differs:
        raise ValueError(
            f"{recipe.run_dir} holds a run with another {', '.join(differs)}; go on with what is in {found.folder / RECIPE}, "
            "or choose another --run-dir"
        )


def vocabulary_of(recipe: Recipe, shards: ShardSet) -> bytes:
    """The sentencepiece model of a run: that of its newest checkpoint or, before the first, in its folder, made of the
    captions of the set."""
    assert recipe.text_encoder is not None
    found = checkpoint.newest(recipe.run_dir)
    if found is not None:
        vocabulary = found.vocabulary()
        assert vocabulary is not None, "a run that goes on has the text encoder that it had"
        return vocabulary
    path = recipe.run_dir / VOCABULARY
    if not path.exists():
        count = min(len(shards), VOCABULARY_CAPTIONS)
        captions = [shards.read_encoded(i, ("txt",)).caption for i in range(count)]
        train_sentencepiece(captions, recipe.text_encoder.vocab_size, path, lower_case=recipe.text_encoder.lower_case)
    return path.read_bytes()


class Trainer:
    """One run on one rank. Make it on every rank, which resumes from the newest whole checkpoint, then call `run`."""

    def __init__(self, recipe: Recipe, deepspeed_config: dict[str, Any], runtime: Runtime) -> None:
        self.recipe, self.runtime = recipe, runtime
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
        self.engine = Engine(runtime, partial(self._build, codes_VD), deepspeed_config, optimizer)
        self.text_encoder: TextEncoder | None = self.engine.module.text_encoder
        self.first_step = checkpoint.resume(self.engine, recipe.run_dir)
        self.signalled = False

    # Batches

    def _micro_batches(self, samples: Sequence[Any]) -> list[MicroBatch]:
        size = self.engine.micro_batch
        return [self._collate(samples[start : start + size]) for start in range(0, len(samples), size)]

    def _collate(self, samples: Sequence[Any]) -> MicroBatch:
        batch = collate_codes(samples)
        return batch["codes"], *condition_tensors(batch, self.recipe, self.text_encoder)

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

    def run(self, progress: Progress | None = None) -> Outcome:
        """Train to the last step, or until a signal; `progress` is told of every step."""
        progress = progress or Progress()
        recipe, train, first = self.recipe, self.recipe.train, self.runtime.is_first
        step = self.first_step
        if first:
            write_bytes(recipe.run_dir / RECIPE, self._files[RECIPE])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        saved_at = step
        with (
            MetricsLog(recipe, step, enabled=first) as log,
            BatchLoader(
                self.shards, self.order, self.engine.global_batch, self.runtime.rank, self.runtime.ranks, step,
                self._micro_batches, workers=recipe.data.workers,
            ) as loader,
            tqdm(total=train.steps, initial=step, desc=recipe.name, unit="step", disable=not first) as bar,
        ):  # fmt: skip
            window = _Window(loader)
            while step < train.steps:
                batch_step, micro_batches = next(loader)
                assert batch_step == step, (batch_step, step)
                # Dropout differs from rank to rank and from step to step, and not from run to run.
                torch.manual_seed(_mix(train.seed, step, 2 + self.runtime.rank))
                unconditional = self._unconditional(step)
                parts: Sequence[Tensor | None] = (
                    [None] * len(micro_batches)
                    if unconditional is None
                    else unconditional.split(self.engine.micro_batch)
                )
                inputs = [(*batch, part) for batch, part in zip(micro_batches, parts, strict=True)]
                window.losses.append(self.engine.step(inputs, lr_at(train, step)))
                step += 1
                progress.step(step)
                bar.update()
                if step % train.log_every == 0 or step == train.steps:
                    row = self._report(window, step)
                    log.write(row)
                    bar.set_postfix(loss=f"{row['loss']:.3f}", samples_per_s=f"{row['samples_per_s']:.0f}")
                    window = _Window(loader)
                if recipe.data.validation and (step % train.validate_every == 0 or step == train.steps):
                    with window.paused(), progress.busy("validating"):
                        log.write({"step": step, "val_loss": self.validation_loss()})
                if train.sample_every and (step % train.sample_every == 0 or step == train.steps):
                    with window.paused(), progress.busy("sampling"):
                        log.image(step, self.sample_grid(step))
                stop = self.engine.any_rank(self.signalled)
                if stop or step % train.save_every == 0 or step == train.steps:
                    with window.paused(), progress.busy("saving"):
                        checkpoint.save(
                            self.engine, recipe.run_dir, step, self.inputs, self._files,
                            keep_last=train.keep_last, averaged=train.ema_decay > 0,
                        )  # fmt: skip
                    saved_at = step
                if stop:
                    break
        assert saved_at == step, (saved_at, step)
        return Outcome(step, step < train.steps)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signalled = True
        if number == signal.SIGINT:  # whoever asks twice does not want to wait for the save
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _report(self, window: "_Window", step: int) -> dict[str, float]:
        seconds, waited, losses = window.seconds(), window.waited(), window.losses
        total, count = self.engine.sum_over_ranks([float(torch.stack(losses).double().sum()), len(losses)])
        samples_per_s = len(losses) * self.engine.global_batch / seconds
        return {
            "step": step,
            "loss": total / count,
            "grad_norm": self.engine.gradient_norm(),
            "lr": lr_at(self.recipe.train, step - 1),
            "samples_per_s": samples_per_s,
            "tokens_per_s": samples_per_s * math.prod(self.recipe.model.grid),
            "data_wait_share": waited / seconds,
            "epoch": self.order.epochs(step, self.engine.global_batch),
            "seconds_left": (self.recipe.train.steps - step) * seconds / len(losses),
        }

    # Looking at the model

    def validation_loss(self) -> float:
        """Mean loss (nats per token) over the samples kept for validation, without dropout or dropped conditions."""
        count, size = self.recipe.data.validation, self.engine.micro_batch
        assert count > 0, "no samples are kept for validation"
        mine = list(range(len(self.shards) - count + self.runtime.rank, len(self.shards), self.runtime.ranks))
        rounds = math.ceil(math.ceil(count / self.runtime.ranks) / size)
        total = 0.0
        for start in range(0, rounds * size, size):
            # Every rank makes the same number of calls; one that has run out repeats a sample, with weight 0.
            numbers = mine[start : start + size]
            loss = self.engine.evaluate(
                (*self._collate([self.shards.read_encoded(i) for i in numbers or [len(self.shards) - 1]]), None)
            )
            total += loss * len(numbers)
        return self.engine.sum_over_ranks([total])[0] / count

    def sample_grid(self, step: int) -> Path | None:
        """Draw the recipe's sample prompts on the first rank; returns the path of the PNG there, None elsewhere.

        Clips are film strips, one below the other: their frames side by side.
        """
        recipe, path = self.recipe, None
        weights = self.engine.weights_on_first() if self.engine.stage == 3 else None
        if self.runtime.is_first:
            module = self.engine.module
            if weights is not None:
                # The model in training would wait for the other ranks to bring their parts, at every layer.
                module = self._build().to(self.engine.dtype)
                module.load_state_dict(weights)
                module.to(self.runtime.device)
            was_training = module.training
            pipe, seed = self.pipeline(module, step), recipe.train.seed
            grid = (
                film_strips(pipe.clips(self._prompts(), seed))
                if pipe.draws_clips
                else picture_grid(pipe(self._prompts(), seed))
            )
            module.train(was_training)
            if self._frozen_text_encoder is not None:
                self._frozen_text_encoder.to("cpu")  # read once, and in nobody's way between two grids
            path = recipe.run_dir / "samples" / f"step-{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)
        self.engine.barrier()
        return path

    def _prompts(self) -> list[Any]:
        """The recipe's prompts, or eight conditions from the end of the set, which is kept for validation."""
        classes = self.recipe.model.condition == "class"
        if prompts := self.recipe.train.sample_prompts:
            return [int(prompt) for prompt in prompts] if classes else list(prompts)
        samples = [self.shards.read_encoded(i) for i in range(max(0, len(self.shards) - 8), len(self.shards))]
        return [s.label if classes else s.caption for s in samples]

    @cached_property
    def _image_tokenizer(self) -> VQModel:
        return load_vq(self.recipe.tokenizer)

    @cached_property
    def _frozen_text_encoder(self) -> TextEncoder | None:
        name = self.recipe.frozen_text_encoder
        return None if name is None else TextEncoder.from_pretrained(name)

    def pipeline(self, module: TrainingModel, step: int) -> TextToImagePipeline:
        """The model in training as a pipeline, sharing its weights."""
        text_encoder = module.text_encoder or self._frozen_text_encoder
        pipe = TextToImagePipeline(
            module.nar, self._image_tokenizer, text_encoder, self.recipe.sample, self.recipe.image_size,
            Provenance(self.recipe.name, step),
        )  # fmt: skip
        return pipe.to(self.runtime.device)


class _Window:
    """What has happened since the last report."""

    def __init__(self, loader: BatchLoader[Any]) -> None:
        self._loader, self._begun, self._waited = loader, time.perf_counter(), loader.wait_seconds
        self.losses: list[Tensor] = []

    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def waited(self) -> float:
        return self._loader.wait_seconds - self._waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the window's rates."""
        begun = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begun


def _mix(*numbers: int) -> int:
    """A seed from several numbers, far apart for neighbouring ones."""
    value = 0
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) % 2**63
        value ^= value >> 29
    return value
