"""What DeepSpeed trains: the NAR model, with the text encoder in front of it where that is trained too.

Shape suffixes: B batch, P caption tokens, X condition channels.
"""

from typing import Any

from torch import Tensor, nn

from t2i.config import Recipe
from t2i.costs import training_flops_per_sample
from t2i.layers import RMSNorm
from t2i.model import NAR
from t2i.text_encoder import TextEncoder, pad_left


class TrainingModel(nn.Module):
    """Loss of a batch from its tokens and condition: `nar`, and `text_encoder` or None."""

    def __init__(self, nar: NAR, text_encoder: TextEncoder | None = None) -> None:
        super().__init__()
        self.nar = nar
        self.text_encoder = text_encoder

    def forward(
        self, tokens: Tensor, condition: Tensor, condition_mask: Tensor | None, unconditional_B: Tensor | None
    ) -> Tensor:
        """Mean cross-entropy (nats per token); `condition` holds caption token ids [B, P] with a trained text encoder,
        else caption states [B, P, X] or class labels [B]."""
        if self.text_encoder is not None:
            assert condition_mask is not None, "caption token ids come with their mask"
            condition = self.text_encoder(condition, condition_mask)
        loss: Tensor = self.nar(tokens, condition, condition_mask, unconditional_B)
        return loss


def build_model(recipe: Recipe, sentencepiece_model: bytes | None, codes_VD: Tensor | None = None) -> TrainingModel:
    """A fresh model of a recipe.

    `sentencepiece_model` is the vocabulary of its trained text encoder, if it has one; `codes_VD` are the tokenizer's
    code vectors, where the prediction heads are to start from them.
    """
    text_encoder = None
    if recipe.text_encoder is not None:
        assert sentencepiece_model is not None, "a trained text encoder needs its vocabulary"
        text_encoder = TextEncoder.from_config(recipe.text_encoder, sentencepiece_model)
    nar = NAR(recipe.model, codes_VD)
    nar.activation_checkpointing = recipe.train.activation_checkpointing
    return TrainingModel(nar, text_encoder)


def parameter_groups(model: TrainingModel, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices decay; norms, embeddings and position tables do not."""
    kept: set[int] = set()
    for module in model.modules():
        is_norm = isinstance(module, RMSNorm) or type(module).__name__.endswith("LayerNorm")
        if is_norm or isinstance(module, nn.Embedding):
            kept |= {id(parameter) for parameter in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if name.endswith((".uncond", ".positions")):
            kept.add(id(parameter))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in kept], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in kept], "weight_decay": 0.0},
    ]


def condition_tensors(
    batch: dict[str, Any], recipe: Recipe, text_encoder: TextEncoder | None
) -> tuple[Tensor, Tensor | None]:
    """Condition and mask of a collated batch, on the processor, as `TrainingModel.forward` takes them.

    Raises ValueError where the shards lack what the recipe trains on.
    """
    if recipe.model.condition == "class":
        if batch["labels"] is None:
            raise ValueError(
                f"recipe {recipe.name} is class-conditional and samples of {recipe.data.path} have no .cls members; "
                "encode a set that has them"
            )
        labels: Tensor = batch["labels"]
        wrong = labels[(labels < 0) | (labels >= recipe.model.num_classes)]
        if len(wrong):
            raise ValueError(
                f"{recipe.data.path} holds class {int(wrong[0])}, and recipe {recipe.name} has "
                f"{recipe.model.num_classes} classes (0 to {recipe.model.num_classes - 1}); set model.num_classes"
            )
        return labels, None
    if text_encoder is not None:
        return text_encoder.tokenize(batch["captions"])
    if batch["states"] is None:
        raise ValueError(
            f"recipe {recipe.name} trains on stored text states and {recipe.data.path} has none; encode it with "
            "--text-encoder"
        )
    return pad_left(batch["states"], recipe.model.max_condition)


def training_flops(recipe: Recipe, tokens: Tensor, condition: Tensor, condition_mask: Tensor | None) -> int:
    """The model's FLOPs, forward and backward, of a micro-batch as `TrainingModel.forward` takes it, padding included."""
    return len(tokens) * training_flops_per_sample(recipe, condition.shape[1] if condition.dim() > 1 else 0)
