"""Published NAR and LlamaGen weights as models of this package.

    model = load_official_nar(state_dict, grid=(16, 16), n_head=20)
    model = load_official_llamagen(state_dict, grid=(24, 24), n_head=20)
    model = load_official_nar(llamagen_state_dict, grid=(16, 16), n_head=20, warm_start=True)

`t2i.convert_files` does it for files. Both families have the same embeddings, blocks and options. A LlamaGen model (arXiv
2406.06525) has one head, for the next token of raster order; a NAR model (arXiv 2503.10696, section 3) has a block, a norm
and a head more for each axis after the first.

Shape suffixes: V vocabulary, C width, A axes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import mode
from typing import Any, Literal

import torch
from torch import Tensor

from t2i.config import ModelConfig
from t2i.model import NAR
from t2i.wavefronts import Grid

# Published names of each axis's norm and head, in the order of the axes, for one axis (raster), two and three. In the
# published video model R is right, D down and B back, the next frame.
_HEADS = {
    1: (("norm", "output"),),
    2: (("medusa_norm", "medusa_output"), ("norm", "output")),
    3: (("norm_B", "output_B"), ("norm_D", "output_D"), ("norm_R", "output_R")),
}
_NAMES = {
    "tokens.weight": "tok_embeddings.weight",
    "prefix.embedding.weight": "cls_embedding.embedding_table.weight",
    "prefix.fc1.weight": "cls_embedding.cap_proj.fc1.weight",
    "prefix.fc2.weight": "cls_embedding.cap_proj.fc2.weight",
    "prefix.uncond": "cls_embedding.uncond_embedding",
    "positions": "abs_pe",
}
# What a published model holds besides weights once it has drawn: tables that follow from its sizes, and its cache.
_NO_WEIGHT = re.compile(r"freqs_cis|causal_mask|diagonal_mask|layers\.\d+\.attention\.kv_cache\.[kv]_cache")
_FFN_MULTIPLE = 256  # of the published feed-forwards
_CAPTION = 120  # positions of a published caption prefix


def load_official_nar(
    state_dict: Mapping[str, Tensor], *, grid: Grid, n_head: int, n_kv_head: int | None = None, warm_start: bool = False
) -> NAR:
    """A `NAR` with published weights, in float32 and evaluation mode, with the published options.

    Everything but the grid and the numbers of heads is read off the shapes: text or class condition, widths, layers,
    vocabulary.

    Args:
        state_dict: Weights under their published names.
        grid: (rows, columns) of an image model, (frames, rows, columns) of a video model.
        n_head: Attention heads.
        n_kv_head: Grouped key-value heads; as many as heads when not given.
        warm_start: The weights are a raster model's (LlamaGen), to be trained further as a NAR model; see `_neighbors`.

    Raises ValueError that lists every missing, unexpected or misshapen key, or says that the weights are of another kind.
    """
    if warm_start:
        return _neighbors(load_official_llamagen(state_dict, grid=grid, n_head=n_head, n_kv_head=n_kv_head))
    if _is_raster(state_dict):
        raise ValueError(
            "these are the weights of a raster autoregressive model (LlamaGen): they have one head, `output`, and a NAR "
            "model needs one per axis; open them with load_official_llamagen (`t2i convert --kind raster`), or start a NAR "
            "model from them with warm_start=True (`--kind warm-start`)"
        )
    if len(grid) not in (2, 3):
        raise ValueError(f"grid {tuple(grid)} fits no published model; give two axes for images or three for video")
    return _load(state_dict, "neighbor", tuple(grid), n_head, n_kv_head)


def load_official_llamagen(
    state_dict: Mapping[str, Tensor], *, grid: Grid, n_head: int, n_kv_head: int | None = None
) -> NAR:
    """A raster model with LlamaGen's published weights, in float32 and evaluation mode, with the published options.

    Arguments and errors as of `load_official_nar`; the grid has two axes.
    """
    if not _is_raster(state_dict) and {_stem(key) for key in state_dict} & {"medusa_norm", "medusa_output", "output_R"}:
        raise ValueError(
            "these are the weights of a NAR model, with a head for each axis, not of a raster one; open them with "
            "load_official_nar (`t2i convert --kind nar`)"
        )
    if len(grid) != 2:
        raise ValueError(f"grid {tuple(grid)} fits no published raster model; give its two axes, (rows, columns)")
    return _load(state_dict, "raster", tuple(grid), n_head, n_kv_head)


def _stem(key: str) -> str:
    return key.removesuffix(".weight")


def _is_raster(weights: Iterable[str]) -> bool:
    names = {_stem(key) for key in weights}
    return "output" in names and not names & {"medusa_norm", "medusa_output"}


def _neighbors(raster: NAR) -> NAR:
    """The NAR model that starts from a raster one: what it knows is kept, and nothing new disturbs it at first.

    Embeddings, prefix, trunk blocks and the last axis's norm and head are the raster model's; so are the options that its
    trunk was trained with. The further block is the last trunk block with zeroed maps out of attention and feed-forward,
    so that it passes on the states that the head was trained to read, and the further head is a copy: at first it predicts
    what the other one predicts at the same position (as Medusa's heads start, arXiv 2401.10774). Tokens that lie
    beside each other are alike: of a small raster model of the embedded shapes (0.35 nats a token) it makes a NAR model of
    1.95 nats, and 0.55 after 30 steps, where one whose further head starts at zero has 2.07 and 0.93.
    """
    model = _empty(replace(raster.config, order="neighbor"))
    first, weights = raster.config.n_layer, raster.state_dict()
    for axis in range(model.config.n_axes - 1):
        for key, tensor in raster.blocks[-1].state_dict().items():
            zeroed = key in ("attention.wo.weight", "feed_forward.w2.weight")
            weights[f"blocks.{first + axis}.{key}"] = torch.zeros_like(tensor) if zeroed else tensor
        weights[f"heads.norms.{axis + 1}.weight"] = weights["heads.norms.0.weight"]
    weights["heads.weight"] = weights["heads.weight"].expand(-1, model.config.n_axes, -1)
    model.to_empty(device="cpu").load_state_dict(weights)
    return model.eval()


def _empty(config: ModelConfig) -> NAR:
    """A model without memory: no start weights are drawn only to be overwritten."""
    with torch.device("meta"):
        return NAR(config)


def _load(
    state_dict: Mapping[str, Tensor],
    order: Literal["neighbor", "raster"],
    grid: Grid,
    n_head: int,
    n_kv_head: int | None,
) -> NAR:
    weights = {key: tensor for key, tensor in state_dict.items() if not _NO_WEIGHT.fullmatch(key)}
    config, problems = _read_config(weights, order, grid, n_head, n_kv_head)
    model = _empty(config)
    shapes = _published_shapes(model)
    problems += [f"missing {key}" for key in shapes if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in shapes]
    for key, shape in shapes.items():
        if key in weights and tuple(weights[key].shape) != shape:
            problems.append(f"{key} is {tuple(weights[key].shape)}, expected {shape}")
        elif key in weights and not weights[key].is_floating_point():
            problems.append(f"{key} is {weights[key].dtype}, expected floating-point numbers")
    if problems:
        raise ValueError("published weights do not fit: " + "; ".join(problems))
    own: dict[str, Tensor] = {}
    for name in model.state_dict():
        if name == "heads.weight":
            own[name] = torch.stack([weights[f"{output}.weight"] for _, output in _HEADS[config.n_axes]], dim=1)
        else:
            tensor = weights[_published_name(name, config)]
            own[name] = tensor[0] if name == "positions" else tensor
    model.to_empty(device="cpu").load_state_dict(own)
    return model.eval()


def _published_name(name: str, config: ModelConfig) -> str:
    """The published name of a parameter other than `heads.weight`."""
    if match := re.fullmatch(r"heads\.norms\.(\d+)\.weight", name):
        return f"{_HEADS[config.n_axes][int(match[1])][0]}.weight"
    return _NAMES.get(name) or name.replace("blocks.", "layers.", 1)


def _published_shapes(model: NAR) -> dict[str, tuple[int, ...]]:
    """Published names of a model's weights, each with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name == "heads.weight":
            vocab_size, _, width = tensor.shape
            shapes |= {f"{output}.weight": (vocab_size, width) for _, output in _HEADS[model.config.n_axes]}
        else:
            shape = tuple(tensor.shape)
            shapes[_published_name(name, model.config)] = (1, *shape) if name == "positions" else shape
    return shapes


def _read_config(
    weights: Mapping[str, Tensor],
    order: Literal["neighbor", "raster"],
    grid: Grid,
    n_head: int,
    n_kv_head: int | None,
) -> tuple[ModelConfig, list[str]]:
    """The configuration that shapes tell, and what in them no configuration fits.

    Where a key is missing or misshapen another one tells as much, so that all that is wrong is found in one go.
    """
    axes = 1 if order == "raster" else len(grid)
    tables = [weights.get(key) for key in ("tok_embeddings.weight", *(f"{head}.weight" for _, head in _HEADS[axes]))]
    sizes = [tuple(table.shape) for table in tables if table is not None and table.ndim == 2]
    layers = [int(match[1]) for key in weights if (match := re.match(r"layers\.(\d+)\.", key))]
    if not sizes or not layers:
        raise ValueError(
            f"not the weights of a {'LlamaGen' if order == 'raster' else 'NAR'} model: no "
            f"{'tok_embeddings.weight' if not sizes else 'layers'}; the first keys are {', '.join(list(weights)[:5])}"
        )
    vocab_size, width = mode(sizes)
    problems = []

    fields: dict[str, Any] = {}
    text = any(key.startswith(("cls_embedding.cap_proj.", "cls_embedding.uncond_embedding")) for key in weights)
    if text:
        length, channels = _size(weights, "cls_embedding.uncond_embedding", (_CAPTION, None))
        if channels is None:
            channels = _size(weights, "cls_embedding.cap_proj.fc1.weight", (None, ModelConfig.condition_dim))[1]
        fields = {"condition_dim": channels, "max_condition": length, "uncond_tokens": length, "uncond_mask": "caption"}
    else:
        rows = _size(weights, "cls_embedding.embedding_table.weight", (ModelConfig.num_classes + 1, None))[0]
        fields = {"num_classes": max(1, rows - 1)}

    rows = _rows(weights, "attention.wqkv")
    kv_heads = n_head if n_kv_head is None else n_kv_head
    if rows is not None and n_head > 0 and width % n_head == 0 and rows != width // n_head * (n_head + 2 * kv_heads):
        fitting = (rows - width) / (2 * (width // n_head))
        remedy = "; give the model's n_head"
        if fitting >= 1 and n_head % fitting == 0:
            kv_heads, remedy = int(fitting), f"; give n_kv_head {int(fitting)}"
        given = f"n_head {n_head}" if n_kv_head is None else f"n_head {n_head} and n_kv_head {n_kv_head}"
        problems.append(f"attention.wqkv has {rows} rows, which are not those of width {width} with {given}{remedy}")

    hidden = _rows(weights, "feed_forward.w1")
    least, multiple = int(8 * width / 3), _FFN_MULTIPLE
    if hidden is not None and -(-least // multiple) * multiple != hidden:
        if hidden >= least:
            multiple = next(m for m in range(1, hidden + 1) if -(-least // m) * m == hidden)
        else:
            problems.append(
                f"feed_forward.w1 has {hidden} rows; a feed-forward of width {width} has at least {least} (8/3 of it)"
            )
    config = ModelConfig(
        grid=grid, order=order, vocab_size=vocab_size, n_layer=max(1, max(layers) + 2 - axes), n_head=n_head,
        n_kv_head=None if kv_heads == n_head else kv_heads, width=width, ffn_multiple=multiple,
        condition="text" if text else "class", positions="learned" if axes == 3 else "rotary", prefix_rotary="zero",
        uncond_embedding="frozen", zero_init_heads="all" if axes == 3 else "last", **fields,
    )  # fmt: skip
    return config, problems


def _size(weights: Mapping[str, Tensor], key: str, otherwise: tuple[Any, Any]) -> tuple[Any, Any]:
    """Rows and columns of a matrix, or other numbers where it is missing or none, which the caller lists."""
    tensor = weights.get(key)
    return otherwise if tensor is None or tensor.ndim != 2 else (tensor.shape[0], tensor.shape[1])


def _rows(weights: Mapping[str, Tensor], name: str) -> int | None:
    """Rows of a matrix that every block has, as most of them have it; None where none has."""
    found = [t.shape[0] for key, t in weights.items() if re.fullmatch(rf"layers\.\d+\.{name}\.weight", key) and t.ndim]
    return mode(found) if found else None
