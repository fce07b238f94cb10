"""Raw shards to encoded shards, once, so that training reads token codes instead of decoding pictures: `t2i
encode`.

Each raw shard becomes one encoded shard of the same name: per sample the codes of its picture (uint16), its
caption, its class if it has one, and, when asked for, the text encoder's states (bf16, unpadded). A shard
carries what it was encoded with and from in a global PAX header, and takes its name only when it is whole: an
interrupted run is continued by running it again. The models come in as functions; nothing here knows them.
Of animated pictures the first frames can be encoded together: the samples are then clips.
Shape suffixes: B samples of a batch, T frames, H and W pixels, C channels, L tokens of a caption.
"""

import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from data_pipeline.images import CROP_POLICY, center_crop_resize, open_frames, open_rgb
from data_pipeline.index import Manifest, RawSample, ShardInfo, ShardSet, build_index, index_shard
from data_pipeline.manifest import remove_manifest
from data_pipeline.shard_index import Settings
from data_pipeline.tars import ShardWriter, read_pax, tar_names
from data_pipeline.verify import CODES, ENCODING_RECORD, STATES

SOURCE_RECORD: Final = "T2I.source"
"""Global PAX record that says which raw shard, as it was then, an encoded shard was made from."""

EncodeImages = Callable[[np.ndarray], np.ndarray]
EncodeText = Callable[[list[str]], list[torch.Tensor]]

_FIELDS: Final = ("tokenizer_sha256", "text_encoder_sha256", "crop", "image_size", "grid", "codebook_size")
_BATCHES_AHEAD: Final = 2


def encode_set(
    raw_root: Path,
    out: Path,
    *,
    encode_images: EncodeImages,
    encode_text: EncodeText | None,
    image_size: int,
    encoding: Mapping[str, Any],
    frames: int | None = None,
    batch_size: int = 64,
    rank: int = 0,
    ranks: int = 1,
    progress: bool = True,
    threads: int = 2,
) -> Manifest | None:
    """Encode this rank's shards of an indexed raw set into `out`, shard i belonging to rank `i % ranks`.

    `encode_images` maps uint8 [B, H, W, C=3], H = W = `image_size`, to integer codes [B, *grid]. With `frames`, samples are
    the first so many frames of animated pictures (see `images.open_frames`), and it maps uint8 [B, T, H, W, C=3].
    `encode_text`, unless None, maps B captions to B tensors [L, C]. `encoding` says what they are: tokenizer_sha256,
    text_encoder_sha256 (None without `encode_text`), crop (`images.CROP_POLICY`), image_size, grid, codebook_size, and
    frames if they are given. `threads` decode pictures ahead. Shards finished by an earlier run with the same encoding,
    from the same raw shard, are skipped. The rank that finds every shard finished writes the manifest of `out` and
    returns it; the others return None.

    Raises ValueError when `raw_root` is no indexed raw set, a raw sample cannot be read or has fewer frames, `out` holds
    shards of something else, `batch_size` is below 1, or `encoding` is incomplete, contradicts the other arguments, or
    differs from a finished shard's.
    """
    raw_root, out = Path(raw_root), Path(out)
    encoding = _checked(encoding, image_size, frames, encode_text is not None)
    assert 0 <= rank < ranks, (rank, ranks)
    raw = ShardSet(raw_root)
    if raw.manifest.kind != "raw":
        raise ValueError(f"{raw_root} is encoded already: give the raw set")
    if len(raw) == 0:
        raise ValueError(f"{raw_root} has no good samples to encode: see its quarantine.jsonl for the causes")
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} holds no sample: set at least 1")
    if out.resolve() == raw_root.resolve():
        raise ValueError(f"the encoded set cannot replace the raw one in {out}: choose another out folder")
    _refuse_strangers(raw, out)
    finished = {s.name for s in raw.manifest.shards if s.samples == 0 or _is_finished(raw, s, out, encoding)}
    mine = [shard for number, shard in enumerate(raw.manifest.shards) if number % ranks == rank]
    done = sum(shard.samples for shard in mine if shard.name in finished)
    bar = tqdm(total=sum(s.samples for s in mine), initial=done, desc="encode", unit="sample", disable=not progress)
    with bar, ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for shard in mine:
            if shard.name in finished:
                continue
            pax = {ENCODING_RECORD: json.dumps(encoding), SOURCE_RECORD: json.dumps(_source(raw, shard))}
            remove_manifest(out)
            with ShardWriter(out / shard.name, pax) as writer:
                for samples, images in _batches(raw, _numbers(raw, shard), batch_size, image_size, frames, pool):
                    _write_batch(writer, samples, images, encode_images, encode_text, encoding)
                    bar.update(len(samples))
            index_shard(out, shard.name, Settings())
    if not all(s.samples == 0 or _is_finished(raw, s, out, encoding) for s in raw.manifest.shards):
        return None
    # Ranks that finish together may both come here; they write the same bytes, each atomically.
    return build_index(out, progress=False)


def _checked(encoding: Mapping[str, Any], image_size: int, frames: int | None, has_text: bool) -> dict[str, Any]:
    """The encoding as it will be read back from JSON, once it is complete and agrees with the other
    arguments.
    """
    missing = [name for name in _FIELDS if name not in encoding]
    if missing:
        raise ValueError(f"the encoding lacks {', '.join(missing)}: give all of {', '.join(_FIELDS)}")
    if encoding["crop"] != CROP_POLICY:
        raise ValueError(f"crop policy {encoding['crop']!r} is unknown here: the only one is {CROP_POLICY!r}")
    if encoding["image_size"] != image_size:
        raise ValueError(
            f"the encoding says {encoding['image_size']} pixels, image_size is {image_size}: make them equal"
        )
    # Absent for still pictures, so that sets of them are recorded as they always were.
    if encoding.get("frames") != frames:
        raise ValueError(f"the encoding says {encoding.get('frames')} frames, frames is {frames}: make them equal")
    if frames is not None and frames < 1:
        raise ValueError(f"clips of {frames} frames hold nothing: set at least 1")
    if not 1 <= encoding["codebook_size"] <= 65536:
        raise ValueError(f"codebook of {encoding['codebook_size']} does not fit 16-bit codes: use at most 65536")
    if (encoding["text_encoder_sha256"] is not None) != has_text:
        raise ValueError("text_encoder_sha256 goes with a text encoder: give both or neither")
    plain: dict[str, Any] = json.loads(json.dumps(dict(encoding)))
    return plain


def _refuse_strangers(raw: ShardSet, out: Path) -> None:
    expected = {shard.name for shard in raw.manifest.shards if shard.samples}
    present = set(tar_names(out)) if out.is_dir() else set()
    if strangers := sorted(present - expected):
        raise ValueError(
            f"{out} holds {', '.join(strangers[:3])}, which {raw.root} does not: "
            "choose another out folder or remove what does not belong"
        )


def _source(raw: ShardSet, shard: ShardInfo) -> dict[str, Any]:
    facts = {"name": shard.name, "sha256": shard.sha256, "samples": shard.samples}
    return {**facts, "settings": asdict(raw.manifest.settings)}


def _is_finished(raw: ShardSet, shard: ShardInfo, out: Path, encoding: dict[str, Any]) -> bool:
    path = out / shard.name
    if not path.exists():
        return False
    index = index_shard(out, shard.name, Settings())
    recorded = index.encoding or {}
    if recorded != encoding:
        names = [name for name in {**recorded, **encoding} if recorded.get(name) != encoding.get(name)]
        differences = ", ".join(f"{n} {recorded.get(n)!r} there, {encoding.get(n)!r} now" for n in names)
        raise ValueError(f"{path} was encoded differently ({differences}): choose another out folder or remove {out}")
    # A shard that was damaged since, or whose raw shard was made or indexed anew, is encoded again; writing
    # replaces the old one.
    whole = index.read == len(index.key_ends_N) == shard.samples
    source: dict[str, Any] = json.loads(read_pax(path).get(SOURCE_RECORD, "{}"))
    return whole and source == _source(raw, shard)


def _numbers(raw: ShardSet, shard: ShardInfo) -> range:
    first = 0
    for other in raw.manifest.shards:
        if other.name == shard.name:
            break
        first += other.samples
    return range(first, first + shard.samples)


def _decode(raw: ShardSet, number: int, image_size: int, frames: int | None) -> tuple[RawSample, np.ndarray]:
    """A sample and its pixels, uint8 [H, W, C] or, with `frames`, [T, H, W, C]."""
    sample = raw.read_raw(number)
    try:
        pictures = [open_rgb(sample.image)] if frames is None else open_frames(sample.image)
    except ValueError as error:
        raise ValueError(
            f"sample {sample.key!r} of shard {raw.root / raw.shard_of(number)}: {error}; "
            f"it was readable when indexed, so run `t2i data index {raw.root}` again"
        ) from error
    if frames is None:
        return sample, center_crop_resize(pictures[0], image_size)
    if len(pictures) < frames:
        raise ValueError(
            f"sample {sample.key!r} of shard {raw.root / raw.shard_of(number)} has {len(pictures)} of {frames} frames: "
            "ask for fewer, or leave shorter pictures out of the set"
        )
    return sample, np.stack([center_crop_resize(picture, image_size) for picture in pictures[:frames]])


def _batches(
    raw: ShardSet, numbers: range, batch_size: int, image_size: int, frames: int | None, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[RawSample], np.ndarray]]:
    """The samples of a shard in order, `batch_size` at a time, with pictures uint8 [B, H, W, C] or clips [B, T, H, W, C],
    decoded ahead.
    """
    waiting: deque[Future[tuple[RawSample, np.ndarray]]] = deque()
    upcoming = iter(numbers)

    def fill() -> None:
        while len(waiting) < (1 + _BATCHES_AHEAD) * batch_size and (number := next(upcoming, None)) is not None:
            waiting.append(pool.submit(_decode, raw, number, image_size, frames))

    fill()
    while waiting:
        pairs = [waiting.popleft().result() for _ in range(min(batch_size, len(waiting)))]
        fill()
        yield [sample for sample, _ in pairs], np.stack([image for _, image in pairs])


def _write_batch(
    writer: ShardWriter,
    samples: list[RawSample],
    images: np.ndarray,
    encode_images: EncodeImages,
    encode_text: EncodeText | None,
    encoding: dict[str, Any],
) -> None:
    codes = np.asarray(encode_images(images))
    assert codes.shape == (len(samples), *encoding["grid"]), f"codes {codes.shape}, grid {encoding['grid']}"
    assert codes.min() >= 0, "negative code"
    assert codes.max() < encoding["codebook_size"], f"code {codes.max()} of {encoding['codebook_size']}"
    states = encode_text([sample.caption for sample in samples]) if encode_text else [None] * len(samples)
    assert len(states) == len(samples), f"{len(states)} text states for {len(samples)} captions"
    for sample, code, state in zip(samples, codes, states, strict=True):
        writer.add(sample.key, encoded_members(code, sample.caption, sample.label, state))


def encoded_members(
    codes: np.ndarray, caption: str, label: int | None = None, states_LC: torch.Tensor | None = None
) -> dict[str, bytes]:
    """The members of an encoded sample by suffix, from codes [*grid] of 0 to 65535, caption, class and text states."""
    members = {CODES: _npy(codes.astype(np.uint16)), "txt": caption.encode()}
    if label is not None:
        members["cls"] = str(label).encode()
    if states_LC is not None:
        members[STATES] = save({"states": states_LC.detach().to("cpu", torch.bfloat16).contiguous()})
    return members


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()
