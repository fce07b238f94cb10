"""What a run is given, and whether it fits together: recipe, encoded set, tokenizer, text encoder, earlier checkpoints."""

from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_bytes
from data_pipeline.index import ShardSet
from data_pipeline.verify import STATES
from t2i.checkpoint import RECIPE, VOCABULARY, Checkpoint, Inputs
from t2i.config import Recipe
from t2i.text_encoder import text_encoder_sha256, train_sentencepiece
from t2i.vq import vq_sha256
from t2i.warm_start import vocabulary_in

VOCABULARY_CAPTIONS = 50_000
"""Captions, from the start of the set, that a trained text encoder's vocabulary is made from."""


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


def check_resumable(recipe: Recipe, inputs: Inputs, found: Checkpoint) -> None:
    """Raise ValueError where a checkpoint is of another model, of other data, or of another order of it."""
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


def vocabulary_of(recipe: Recipe, shards: ShardSet, found: Checkpoint | None) -> bytes:
    """The sentencepiece model of a run: that of the checkpoint that it goes on from or, before the first, in its folder, taken
    from where its weights are from (`train.init_from`) or made of the captions of the set."""
    assert recipe.text_encoder is not None
    if found is not None:
        vocabulary = found.vocabulary()
        assert vocabulary is not None, "a run that goes on has the text encoder that it had"
        return vocabulary
    path = recipe.run_dir / VOCABULARY
    source = recipe.train.init_from
    if not path.exists() and source is not None and (inherited := vocabulary_in(Path(source))) is not None:
        write_bytes(path, inherited)
    if not path.exists():
        count = min(len(shards), VOCABULARY_CAPTIONS)
        captions = [shards.read_encoded(i, ("txt",)).caption for i in range(count)]
        train_sentencepiece(captions, recipe.text_encoder.vocab_size, path, lower_case=recipe.text_encoder.lower_case)
    return path.read_bytes()
