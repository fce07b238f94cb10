"""The image tokenizer: LlamaGen's VQ autoencoder as one configurable class.

    vq = load_vq("shapes")                    # the tokenizer that the package ships
    indices = vq.encode(images)               # [B, 3, H, W] in [-1, 1] -> [B, h, w]
    images = vq.decode(indices)

Structure (LlamaGen, Sun et al. 2024, arXiv 2406.06525, after VQGAN, Esser et al. 2021): convolutional encoder and
decoder, attention at the lowest resolution, codes and encoder outputs L2-normalised before the nearest one is taken.
An encoder of single patches can take the place of the convolutional one (`VQConfig.encoder`).
Parameter names are the published ones, so published weights load as they are (`load_official_vq`).

Shape suffixes: B batch, C channels, D code dimension, H W picture height and width, h w token height and width,
K codebook size.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save
from torch import Tensor, nn

from data_pipeline.atomic import write_bytes
from t2i.config import from_json
from t2i.files import load_weights, read_json
from t2i.tokenizer_config import VQConfig


class _ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        x = self.conv1(F.silu(self.norm1(x)))
        return residual + self.conv2(F.silu(self.norm2(x)))


class _Attention(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        normed = self.norm(x_BChw)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2).contiguous() for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x_BChw + self.proj_out(mixed.transpose(1, 2).reshape_as(x_BChw))


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """The blocks of one resolution, and the step to the next one."""

    downsample: nn.Module
    upsample: nn.Module

    def __init__(self, c_in: int, c_out: int, n_res: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(_ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(n_res))
        self.attn = nn.ModuleList(_Attention(c_out, groups) for _ in range(n_res if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


def _middle(channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [_ResBlock(channels, channels, groups), _Attention(channels, groups), _ResBlock(channels, channels, groups)]
    )


class _Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        groups = config.norm_groups
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        c_in = config.base_channels
        for i, width in enumerate(widths):
            lowest = i == len(widths) - 1
            level = _Level(c_in, width, config.n_res_blocks, groups, attention=lowest)
            if not lowest:
                level.downsample = _Downsample(width)
            self.conv_blocks.append(level)
            c_in = width
        self.mid = _middle(c_in, groups)
        self.norm_out = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv_out = nn.Conv2d(c_in, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _PatchBlock(nn.Module):
    """Pre-norm MLP on each position by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 2 * channels)
        self.fc2 = nn.Linear(2 * channels, channels)

    def forward(self, x_BhwC: Tensor) -> Tensor:
        return x_BhwC + self.fc2(F.silu(self.fc1(self.norm(x_BhwC))))


class _PatchEncoder(nn.Module):
    """The pixels of each token, and no others, to its features."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        channels = 2 * config.base_channels * config.channel_multipliers[-1]
        self.stride = config.stride
        self.fc_in = nn.Linear(3 * config.stride**2, channels)
        self.blocks = nn.Sequential(*(_PatchBlock(channels) for _ in range(2 * config.n_res_blocks)))
        self.fc_out = nn.Linear(channels, config.z_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        patches = rearrange(x_BCHW, "b c (h p) (w q) -> b h w (p q c)", p=self.stride, q=self.stride)
        return self.fc_out(self.blocks(self.fc_in(patches))).movedim(-1, 1)


class _Decoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in reversed(config.channel_multipliers)]
        groups = config.norm_groups
        c_in = widths[0]
        self.conv_in = nn.Conv2d(config.z_channels, c_in, 3, padding=1)
        self.mid = _middle(c_in, groups)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = _Level(c_in, width, config.n_res_blocks + 1, groups, attention=i == 0)
            if i < len(widths) - 1:
                level.upsample = _Upsample(width)
            self.conv_blocks.append(level)
            c_in = width
        self.norm_out = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv_out = nn.Conv2d(c_in, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            z = block(z)
        return self.conv_out(F.silu(self.norm_out(z)))


class _Codebook(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.normal_(self.embedding.weight)

    def normalized(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1)


class VQModel(nn.Module):
    """Vector-quantised autoencoder of pictures: encoder, codebook, decoder. See the module's docstring."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _PatchEncoder(config) if config.encoder == "patches" else _Encoder(config)
        self.decoder = _Decoder(config)
        self.quantize = _Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """L2-normalised encoder outputs [B, D, h, w] of images [B, 3, H, W] in [-1, 1], before quantisation.

        Raises ValueError where height or width is not a multiple of the stride.
        """
        height, width = images_BCHW.shape[-2:]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"picture of {height}x{width} pixels does not divide into tokens of {self.config.stride}; "
                f"crop or resize it to a multiple"
            )
        return F.normalize(self.quant_conv(self.encoder(images_BCHW)), dim=1)

    def nearest(self, features_BDhw: Tensor) -> Tensor:
        """Index of the nearest code for each position: [B, D, h, w] (unit length) -> int64 [B, h, w]."""
        # Between unit vectors the nearest is the one with the largest inner product.
        similarity = torch.einsum("bdhw,kd->bhwk", features_BDhw, self.quantize.normalized())
        return similarity.argmax(-1)

    def embed(self, indices_Bhw: Tensor) -> Tensor:
        """Unit-length code vectors of indices: [B, h, w] -> [B, D, h, w]."""
        return self.quantize.normalized()[indices_Bhw].permute(0, 3, 1, 2)

    def decode_features(self, features_BDhw: Tensor) -> Tensor:
        """Images [B, 3, H, W] (about [-1, 1], not clipped) from code vectors [B, D, h, w]."""
        return self.decoder(self.post_quant_conv(features_BDhw))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Token indices of images: [B, 3, H, W] in [-1, 1] -> int64 [B, h, w], h = H / stride."""
        return self.nearest(self.features(images_BCHW))

    def decode(self, indices_Bhw: Tensor) -> Tensor:
        """Images of token indices: [B, h, w] -> [B, 3, H, W], about [-1, 1], not clipped."""
        return self.decode_features(self.embed(indices_Bhw))

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and `model.safetensors`; float16 halves the file, loading always gives float32."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in self.state_dict().items()}
        write_bytes(folder / "model.safetensors", save(weights))  # save_file's would be for the owner's eyes only
        write_bytes(folder / "config.json", json.dumps(asdict(self.config), indent=2).encode())

    @classmethod
    def from_folder(cls, folder: Path | str) -> "VQModel":
        """The model that `save` wrote to a folder, in float32 and evaluation mode. Raises ValueError where it is not."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"tokenizer folder {folder} has no {name}; give a folder that `t2i tokenizer train` wrote"
                )
        path = folder / "config.json"
        fields = read_json(path)
        if "provenance" in fields and (folder / "tokenizer").is_dir():
            raise ValueError(f"{folder} is an export, not a tokenizer; its tokenizer is in {folder / 'tokenizer'}")
        if "channel_multipliers" not in fields:
            raise ValueError(f"{path} describes no image tokenizer; give a folder that `t2i tokenizer train` wrote")
        model = cls(from_json(VQConfig, path.read_bytes(), path))
        load_weights(model, folder / "model.safetensors", "config.json")
        return model.eval()


def images_to_tensor(images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    stacked = np.ascontiguousarray(np.stack(list(images)) if not isinstance(images, np.ndarray) else images)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def tensor_to_images(images_BCHW: Tensor) -> np.ndarray:
    """float [B, 3, H, W], about [-1, 1] -> uint8 [B, H, W, 3], clipped."""
    pixels = ((images_BCHW.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def vq_folder(name_or_folder: str) -> Path:
    """The folder of a tokenizer: "shapes" is the one that the package ships, anything else is a path."""
    if name_or_folder == "shapes":
        return Path(str(files("t2i"))) / "assets" / "shapes_vq"
    return Path(name_or_folder)


def load_vq(name_or_folder: str) -> VQModel:
    """A tokenizer by name ("shapes") or folder, in evaluation mode and without gradients."""
    return VQModel.from_folder(vq_folder(name_or_folder)).requires_grad_(False)


def vq_sha256(name_or_folder: str) -> str:
    """Hash of a tokenizer's configuration and weights, which encoded shards record. Raises ValueError where it is not."""
    folder, digest = vq_folder(name_or_folder), hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"tokenizer {name_or_folder!r}: {folder} has no {name}; train or convert one first")
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def load_official_vq(state_dict: Mapping[str, Tensor]) -> VQModel:
    """A `VQModel` from published VQ weights; channels, multipliers and codebook are read off the shapes.

    Raises ValueError that lists every missing, unexpected or misshapen key.
    """
    weights = {k: v for k, v in state_dict.items() if k != "quantize.codebook_used"}  # a training statistic
    levels: dict[int, int] = {}
    blocks = set()
    for key in weights:
        if match := re.fullmatch(r"encoder\.conv_blocks\.(\d+)\.res\.(\d+)\.conv1\.weight", key):
            levels[int(match[1])] = _size(weights, (key, 0))
            blocks.add(int(match[2]))
    if not levels:
        first = ", ".join(list(weights)[:5])
        raise ValueError(f"not the weights of a VQ tokenizer: no encoder.conv_blocks; the first keys are {first}")
    # Where a key is missing or misshapen another one tells as much, so that all that is wrong is found in one go.
    base = _size(weights, ("encoder.conv_in.weight", 0), ("encoder.conv_blocks.0.res.0.conv1.weight", 1))
    model = VQModel(
        VQConfig(
            base_channels=base,
            channel_multipliers=tuple(max(1, levels[i] // base) for i in sorted(levels)),
            n_res_blocks=len(blocks),
            z_channels=_size(weights, ("encoder.conv_out.weight", 0), ("quant_conv.weight", 1)),
            codebook_size=_size(weights, ("quantize.embedding.weight", 0)),
            codebook_dim=_size(weights, ("quantize.embedding.weight", 1), ("quant_conv.weight", 0)),
        )
    )
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in own]
    problems += [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if problems:
        raise ValueError("published tokenizer weights do not fit: " + "; ".join(problems))
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    return model.eval()


def _size(weights: Mapping[str, Tensor], *places: tuple[str, int]) -> int:
    """Size of the first of several axes, each a key and a number, that is there; 1 where none is."""
    found = [weights[key].shape[axis] for key, axis in places if key in weights and weights[key].ndim > axis]
    return max(1, found[0]) if found else 1
