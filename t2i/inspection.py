"""Looking at a model in training: its validation loss, and pictures that it draws.

Nothing is changed by it: the model trains on as if nobody had looked.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from data_pipeline.index import EncodedSample, ShardSet
from data_pipeline.tolerant import TolerantSet
from t2i.animation import film_strips
from t2i.config import Recipe
from t2i.engine import Engine
from t2i.metrics import MetricsLog
from t2i.objective import TrainingModel
from t2i.pipeline import Provenance, TextToImagePipeline, picture_grid
from t2i.rank_log import Progress
from t2i.text_encoder import TextEncoder
from t2i.vq import VQModel, load_vq

Result = TypeVar("Result")
Judge = Callable[[TextToImagePipeline], dict[str, float]]
"""Scores of the pictures that a pipeline draws, by name."""


class Failure(str):
    """Why something that a run does not depend on could not be done."""

    __slots__ = ()


class Inspection:
    """Looks at the model of an engine, on all ranks together."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        shards: ShardSet | TolerantSet,
        build: Callable[[], TrainingModel],
        collate: Callable[[Sequence[Any]], tuple[Tensor | None, ...]],
        judge: Judge | None = None,
    ) -> None:
        """`shards` are read to the end, where the samples for validation are; `build` makes a model like the engine's, and
        `collate` its inputs from samples; `judge` scores pictures, on the first rank."""
        self._judge = judge
        self._recipe, self._engine, self._shards, self._build, self._collate = recipe, engine, shards, build, collate

    def due(self, step: int) -> set[str]:
        """What there is to look at after a step."""
        recipe, last = self._recipe, step == self._recipe.train.steps
        every = {
            "validating": recipe.train.validate_every if recipe.data.validation else 0,
            "sampling": recipe.train.sample_every,
            "judging": recipe.eval.geneval_every,
        }
        return {what for what, steps in every.items() if steps and (last or step % steps == 0)}

    def made(self, step: int, log: MetricsLog) -> set[str]:
        """What of that an earlier process has left rows of, which the first rank has."""
        names = {name for row in log.kept if row["step"] == step for name in row}
        validated, judged = "val_loss" in names, any(name.startswith("geneval") for name in names)
        flags = self._engine.sum_over_ranks([validated, judged])
        return {what for what, made in zip(("validating", "judging"), flags, strict=True) if made}

    def look(self, step: int, due: set[str], log: MetricsLog, progress: Progress) -> None:
        """Look at what is due, and log what is seen."""
        if "validating" in due:
            with progress.busy("validating"):
                log.write({"step": step, "val_loss": self.validation_loss()})
        if "sampling" in due:
            with progress.busy("sampling"):
                log.image(step, self.sample_grid(step))
        if "judging" in due:
            with progress.busy("judging"):
                log.write({"step": step, **self.judged(step)})

    def validation_loss(self) -> float:
        """Mean loss (nats per token) over the samples kept for validation, without dropout or dropped conditions."""
        count, size = self._recipe.data.validation, self._engine.micro_batch
        assert count > 0, "no samples are kept for validation"
        mine = list(
            range(len(self._shards) - count + self._engine.runtime.rank, len(self._shards), self._engine.runtime.ranks)
        )
        rounds = math.ceil(math.ceil(count / self._engine.runtime.ranks) / size)
        total = 0.0
        for start in range(0, rounds * size, size):
            # Every rank makes the same number of calls; one that has run out repeats a sample, with weight 0.
            numbers = mine[start : start + size]
            loss = self._engine.evaluate(
                (*self._collate(self._shards.read_many(numbers or [len(self._shards) - 1])), None)
            )
            total += loss * len(numbers)
        return self._engine.sum_over_ranks([total])[0] / count

    def _of_pictures(
        self, step: int, what: str, function: Callable[[TextToImagePipeline], Result]
    ) -> Result | Failure | None:
        """`function` of the model as a pipeline on the first rank, None elsewhere, where everybody waits for the first.

        Nothing that it fails with ends the run, which does not depend on it: a GPU without room for a judge beside the
        optimizer would else end it here again after every start.
        """
        weights = self._engine.weights_on_first() if self._engine.stage == 3 else None
        result: Result | Failure | None = None
        if self._engine.runtime.is_first:
            module = self._engine.module
            was_training = module.training
            try:
                if weights is not None:
                    # The model in training would wait for the other ranks to bring their parts, at every layer.
                    module = self._build().to(self._engine.dtype)
                    module.load_state_dict(weights)
                    module.to(self._engine.runtime.device)
                result = function(self.pipeline(module, step))
            except (OSError, RuntimeError, ValueError) as error:  # of memory: a RuntimeError
                result = Failure(f"{type(error).__name__}: {error}".splitlines()[0])
                print(f"\nstep {step}: {what} failed ({result}); going on", file=sys.stderr)
            self._engine.module.train(was_training)
            if (encoder := self.__dict__.get("_frozen_text_encoder")) is not None:
                encoder.to("cpu")  # read once, and in nobody's way between two times
        self._engine.barrier()
        return result

    def sample_grid(self, step: int) -> Path | None:
        """Draw the recipe's sample prompts on the first rank; returns the path of the PNG there, None elsewhere or where it
        could not be made.

        Clips are film strips, one below the other: their frames side by side.
        """

        def draw(pipe: TextToImagePipeline) -> Path:
            prompts, seed = self._prompts(), self._recipe.train.seed
            grid = film_strips(pipe.clips(prompts, seed)) if pipe.draws_clips else picture_grid(pipe(prompts, seed))
            path = self._recipe.run_dir / "samples" / f"step-{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)
            return path

        path = self._of_pictures(step, "drawing samples", draw)
        return path if isinstance(path, Path) else None

    def judged(self, step: int) -> dict[str, float | str]:
        """What the judge says of the model's pictures, on the first rank, or why it could not; nothing elsewhere."""

        def judge(pipe: TextToImagePipeline) -> dict[str, float | str]:
            assert self._judge is not None, "the first rank has no judge"
            return {**self._judge(pipe)}

        scores = self._of_pictures(step, "judging pictures", judge)
        return {"geneval_error": scores} if isinstance(scores, Failure) else scores or {}

    def _prompts(self) -> list[Any]:
        """The recipe's prompts, or eight conditions from the end of the set, which is kept for validation."""
        classes = self._recipe.model.condition == "class"
        if prompts := self._recipe.train.sample_prompts:
            return [int(prompt) for prompt in prompts] if classes else list(prompts)
        samples = self._shards.read_many(range(max(0, len(self._shards) - 8), len(self._shards)))
        return [s.label if classes else s.caption for s in samples if isinstance(s, EncodedSample)]

    @cached_property
    def _image_tokenizer(self) -> VQModel:
        return load_vq(self._recipe.tokenizer)

    @cached_property
    def _frozen_text_encoder(self) -> TextEncoder | None:
        name = self._recipe.frozen_text_encoder
        return None if name is None else TextEncoder.from_pretrained(name)

    def pipeline(self, module: TrainingModel, step: int) -> TextToImagePipeline:
        """The model in training as a pipeline, sharing its weights (and packing them while it draws on a processor)."""
        text_encoder = module.text_encoder or self._frozen_text_encoder
        pipe = TextToImagePipeline(
            module.nar, self._image_tokenizer, text_encoder, self._recipe.sample, self._recipe.image_size,
            Provenance(self._recipe.name, step),
        )  # fmt: skip
        return pipe.to(self._engine.runtime.device)
