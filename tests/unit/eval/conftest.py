"""A real export, a Mask2Former and a CLIP, small and random, for tests that run the whole evaluation on loaded folders."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from data_pipeline.shapes import evaluation_metadata
from eval.geneval.prompts import COCO_CLASSES
from t2i.config import ModelConfig, SampleConfig
from t2i.model import NAR
from t2i.pipeline import Provenance, TextToImagePipeline
from t2i.text_encoder import TextEncoder, TextEncoderConfig, train_sentencepiece
from t2i.vq import load_vq

MakeExport = Callable[..., Path]


@pytest.fixture(scope="session")
def make_export(tmp_path_factory: pytest.TempPathFactory) -> MakeExport:
    """make_export(seed=0, step=30) -> folder of a text-to-image model with random weights and the shipped tokenizer."""
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_sentencepiece([entry["prompt"] for entry in evaluation_metadata(20)], 310, vocabulary)

    def make(folder: Path | None = None, seed: int = 0, step: int = 30) -> Path:
        torch.manual_seed(seed)
        folder = folder or tmp_path_factory.mktemp("export")
        config = ModelConfig(
            grid=(8, 8), vocab_size=512, n_layer=1, n_head=2, width=16, condition_dim=16, max_condition=32, dropout=0.0
        )
        text_encoder = TextEncoder.from_config(
            TextEncoderConfig(vocab_size=310, dim=16, n_layer=1, n_head=2, ffn_dim=16, max_length=32), vocabulary
        )
        pipe = TextToImagePipeline(
            NAR(config), load_vq("shapes"), text_encoder, SampleConfig(guidance_scale=1.0), 64,
            Provenance("tiny <test>", step),
        )  # fmt: skip
        pipe.save_pretrained(folder)
        return folder

    return make


CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def small_detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Mask2Former over COCO's classes, with a backbone of Swin blocks and random weights, as transformers saves it.

    Its classes are more certain than chance would make them, so that scores spread out, and its masks are of parts of pictures.
    """
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=10,
        train_num_points=16, id2label=dict(enumerate(COCO_CLASSES)),
        label2id={name: number for number, name in enumerate(COCO_CLASSES)},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(40)
        model.model.transformer_module.queries_features.weight.mul_(4)
        pixels = model.model.pixel_level_module
        projection = pixels.decoder.mask_projection
        projection.weight.mul_(100)
        projection.bias.sub_(pixels.eval()(torch.randn(1, 3, 64, 64)).decoder_last_hidden_state.mean((0, 2, 3)))
        # A channel that is 1 everywhere, which takes 6 from all logits: what is left are spots.
        projection.weight[0], projection.bias[0] = 0.0, 1.0
        last = model.get_submodule("model.transformer_module.decoder.mask_predictor.mask_embedder.2.0")
        last.weight[0], last.bias[0] = 0.0, -6.0
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    # As the published folder has it: a size that the detector must not take.
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a CLIP with random weights, as open_clip saves it for local-dir:FOLDER."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    vision, text = dict(CLIP_CONFIG["vision_cfg"]), dict(CLIP_CONFIG["text_cfg"])  # type: ignore[call-overload]
    model = open_clip.CLIP(CLIP_CONFIG["embed_dim"], vision, text)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    document = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of FID's Inception, 95 MB, that are random."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:  # it has none to load
            pass

    torch.manual_seed(0)
    with io.BytesIO() as nothing:
        torch.save({}, nothing)
        nothing.seek(0)
        network = Untrained("random", ["2048"], feature_extractor_weights_path=nothing)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file
