import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.index import ShardSet
from t2i.checkpoint import checkpoints
from t2i.export import export, merged_weights
from t2i.pipeline import TextToImagePipeline
from t2i.vq import VQConfig, VQModel

from .conftest import ROOT, STEPS, VALIDATION, environment, rows

pytestmark = pytest.mark.slow

Stage = Callable[[int], Path]
PROMPTS = ["a photo of a red circle left of a blue star", "a photo of two hearts"]


@pytest.fixture(scope="module")
def exported(trained: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """exported(stage) -> the export of a run at that ZeRO stage."""
    folder = tmp_path_factory.mktemp("exports")

    def make(stage: int) -> Path:
        out = folder / f"zero{stage}"
        if not out.exists():
            export(trained(stage), out, weights="raw")
        return out

    return make


def test_every_stage_exports_the_same_weights(exported: Stage) -> None:
    pipes = [TextToImagePipeline.from_pretrained(exported(stage)) for stage in (1, 2, 3)]
    for pipe in pipes[1:]:
        for mine, first in ((pipe.model, pipes[0].model), (pipe.text_encoder, pipes[0].text_encoder)):
            assert mine is not None
            assert first is not None
            for name, tensor in mine.state_dict().items():
                torch.testing.assert_close(
                    tensor, first.state_dict()[name], rtol=0, atol=2e-5, msg=lambda m, n=name: n + m
                )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_export_has_the_validation_loss_of_the_run(trained: Stage, exported: Stage, data: Path, stage: int) -> None:
    pipe = TextToImagePipeline.from_pretrained(exported(stage))
    assert pipe.text_encoder is not None
    shards = ShardSet(data)
    samples = [shards.read_encoded(i) for i in range(len(shards) - VALIDATION, len(shards))]
    tokens = torch.from_numpy(np.stack([s.codes for s in samples]).astype(np.int64)).flatten(1)
    with torch.no_grad():
        logits = pipe.model.logits(tokens, *pipe.text_encoder.encode([s.caption for s in samples]))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    expected = [row["val_loss"] for row in rows(trained(stage)) if "val_loss" in row][-1]
    assert float(loss) == pytest.approx(expected, abs=2e-5)


def test_a_new_process_draws_the_same_pixels_without_deepspeed(exported: Stage, tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from t2i.pipeline import TextToImagePipeline\n"
        "pipe = TextToImagePipeline.from_pretrained(sys.argv[1])\n"
        "np.save(sys.argv[2], np.stack([np.asarray(i) for i in pipe(sys.argv[3:], seed=7)]))\n"
        "assert 'deepspeed' not in sys.modules, 'deepspeed was imported'\n"
        "assert not any(name.startswith('t2i.train') for name in sys.modules)\n"
    )
    saved = tmp_path / "pictures.npy"
    subprocess.run(
        [sys.executable, "-c", code, str(exported(2)), str(saved), *PROMPTS], cwd=ROOT, env=environment(), check=True,
        timeout=120,
    )  # fmt: skip
    here = TextToImagePipeline.from_pretrained(exported(2))(PROMPTS, seed=7)
    np.testing.assert_array_equal(np.load(saved), np.stack([np.asarray(image) for image in here]))


def test_every_stage_exports_the_same_average(trained: Stage) -> None:
    """Not those of the last step, but no farther from them than the last steps have gone."""
    averages = []
    for stage in (1, 2, 3):
        chosen = checkpoints(trained(stage))[-1]
        average, raw = merged_weights(chosen, averaged=True), merged_weights(chosen)
        assert average.keys() == raw.keys()
        moved = max(float((average[name] - raw[name]).abs().max()) for name in raw)
        assert 1e-4 < moved < STEPS * 5e-3
        averages.append(average)
    for other in averages[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, averages[0][name], rtol=0, atol=2e-5, msg=lambda m, n=name: n + m)


def test_the_returned_pipeline_is_the_saved_one(trained: Stage, tmp_path: Path) -> None:
    pipe = export(trained(3), tmp_path / "export", step=4)
    assert (pipe.provenance.recipe, pipe.provenance.step) == ("small", 4)
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "export")
    assert loaded.provenance == pipe.provenance
    assert loaded.sample == pipe.sample
    for one, other in zip(pipe(PROMPTS, seed=1), loaded(PROMPTS, seed=1), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_what_cannot_be_exported_is_named(trained: Stage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint of step 5; it has 4, 8"):
        export(trained(2), tmp_path / "export", step=5)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        export(tmp_path, tmp_path / "export")
    VQModel(VQConfig(base_channels=32, channel_multipliers=(1,), codebook_size=512)).save(tmp_path / "vq")
    with pytest.raises(
        ValueError, match=r"vq is not the image tokenizer that .* was trained with; give that with --token"
    ):
        export(trained(2), tmp_path / "export", tokenizer=str(tmp_path / "vq"))
    assert not (tmp_path / "export").exists()
