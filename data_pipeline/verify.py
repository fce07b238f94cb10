"""Reading every sample of one shard once, to tell the good from the bad and say why.

A sample is good when it can be trained on as it is; every other one is set aside under one of `CAUSES`. Shape
suffixes: N good samples, M distinct member suffixes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from data_pipeline.images import IMAGE_SUFFIXES, verify_frames
from data_pipeline.npy import read_npy
from data_pipeline.shard_index import Rejected, Settings, ShardIndex, file_sha256, pack_keys
from data_pipeline.tars import CORRUPT, TRUNCATED, Group, TarScan, scan_tar

CAUSES: Final = {
    TRUNCATED: "the tar ends early: a member is cut off, or the end-of-archive mark is missing",
    CORRUPT: "the tar cannot be read on from some byte",
    "duplicate_key": "another sample before it has the same key",
    "missing_image": "no jpg, jpeg, png or webp member",
    "missing_caption": "no txt member, and no such field in a json member, or null there",
    "empty_caption": "nothing but white space",
    "bad_caption": "not UTF-8 text, not JSON, or not a string",
    "undecodable_image": "the picture, or a frame of it, does not decode to its last byte",
    "too_small_image": "the shorter side has fewer pixels than asked for",
    "bad_label": "the cls member is not a whole number of at least 0",
    "bad_codes": "the codes are not uint16 in the encoding's grid and codebook",
    "bad_states": "the text states are not one bf16 tensor [length, channels]",
}
ENCODING_RECORD: Final = "T2I.encoding"
"""Global PAX record in which an encoded shard carries its encoding, as JSON."""
CODES: Final = "codes.npy"
STATES: Final = "states.safetensors"


class BadSampleError(Exception):
    """A sample that cannot be used; `cause` is a key of `CAUSES`."""

    def __init__(self, cause: str, detail: str) -> None:
        assert cause in CAUSES, cause
        super().__init__(detail)
        self.cause = cause


def verify_shard(path: Path, name: str, settings: Settings) -> ShardIndex:
    """Read a shard once and index what is good in it; `name` is how the set calls it.

    Raises OSError when the file cannot be read at all; whatever is wrong inside is in the result's
    `rejected`.
    """
    status = path.stat()
    scan = scan_tar(path)
    encoding = json.loads(scan.pax[ENCODING_RECORD]) if ENCODING_RECORD in scan.pax else None
    good: list[Group] = []
    rejected: list[Rejected] = []
    first: dict[str, Group] = {}
    with open(path, "rb") as stream:
        for group in scan.groups:
            try:
                if group.key in first:
                    raise BadSampleError("duplicate_key", f"the first is at byte {first[group.key].offset}")
                _check(group, stream, settings, encoding)
                first[group.key] = group  # not before: a good sample is no duplicate of a bad one
                good.append(group)
            except BadSampleError as error:
                detail = f"{error} (byte {group.offset})"
                rejected.append(Rejected(group.key, name, error.cause, detail))
    rejected += _damage(scan, name, len(good), rejected)
    suffixes = sorted({suffix for group in good for suffix in group.members})
    absent = (-1, -1)
    places_NM2 = np.array([[group.members.get(s, absent) for s in suffixes] for group in good], np.int64)
    places_NM2 = places_NM2.reshape(len(good), len(suffixes), 2)
    keys_K, key_ends_N = pack_keys([group.key for group in good])
    return ShardIndex(
        name=name,
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sha256=file_sha256(path),
        settings=settings,
        read=len(good) + len(rejected),
        ignored=scan.ignored,
        encoding=encoding,
        rejected=rejected,
        suffixes=suffixes,
        keys_K=keys_K,
        key_ends_N=key_ends_N,
        offsets_NM=places_NM2[..., 0],
        sizes_NM=places_NM2[..., 1],
        duplicate_N=np.zeros(len(good), bool),
    )


def caption_of(members: Mapping[str, bytes], caption_key: str) -> str:
    """The caption among a sample's txt and json members, stripped of white space at its ends.

    Raises BadSampleError with the cause `missing_caption`, `empty_caption` or `bad_caption`.
    """
    caption: Any
    if caption_key == "caption" and "txt" in members:
        try:
            caption = members["txt"].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSampleError("bad_caption", f"txt is not UTF-8: {error}") from error
    elif "json" in members:
        try:
            record = json.loads(members["json"])
        except (ValueError, RecursionError) as error:
            raise BadSampleError("bad_caption", f"json cannot be read: {error}") from error
        if not isinstance(record, dict):
            raise BadSampleError("bad_caption", f"json is a {type(record).__name__}, not an object")
        caption = record.get(caption_key)
        if caption is None:
            null = f"field {caption_key!r} of json is null"
            absent = f"no field {caption_key!r} in json, which has {', '.join(sorted(record)) or 'none'}"
            raise BadSampleError("missing_caption", null if caption_key in record else absent)
        if not isinstance(caption, str):
            raise BadSampleError("bad_caption", f"field {caption_key!r} of json is a {type(caption).__name__}")
    else:
        raise BadSampleError("missing_caption", f"no caption among its members {', '.join(sorted(members))}")
    text = str(caption).strip()
    if not text:
        raise BadSampleError("empty_caption", "the caption is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise BadSampleError("bad_caption", f"the caption is not valid Unicode: {error}") from error
    return text


def label_of(members: Mapping[str, bytes]) -> int | None:
    """The class number of a sample, None without a cls member. Raises BadSampleError (`bad_label`)."""
    if "cls" not in members:
        return None
    text = members["cls"].strip()
    if not text.isdigit() or len(text) > 9:
        raise BadSampleError("bad_label", f"cls holds {text[:40]!r}")
    return int(text)


def codes_of(members: Mapping[str, bytes]) -> np.ndarray:
    """The token codes of an encoded sample, uint16 of the grid's shape. Raises BadSampleError
    (`bad_codes`).
    """
    try:
        codes = read_npy(members[CODES])
    except ValueError as error:
        raise BadSampleError("bad_codes", f"{CODES} cannot be read: {error}") from error
    if codes.dtype != np.uint16:
        raise BadSampleError("bad_codes", f"{CODES} is {codes.dtype}, not uint16")
    return codes


def _check(group: Group, stream: BinaryIO, settings: Settings, encoding: dict[str, Any] | None) -> None:
    def read(*suffixes: str) -> dict[str, bytes]:
        wanted = [suffix for suffix in suffixes if suffix in group.members]
        return {s: os.pread(stream.fileno(), group.members[s][1], group.members[s][0]) for s in wanted}

    texts = {**dict.fromkeys(group.members, b""), **read("txt", "json", "cls")}
    if encoding is not None:
        _check_encoded({**texts, **read(CODES, STATES)}, encoding)
    else:
        suffix = next((s for s in IMAGE_SUFFIXES if s in group.members), None)
        if suffix is None:
            detail = f"its members are {', '.join(sorted(group.members))} (a key ends at the first dot of a name)"
            raise BadSampleError("missing_image", detail)
        caption_of(texts, settings.caption_key)
        label_of(texts)
        _check_image(read(suffix)[suffix], settings.min_size)


def _check_image(data: bytes, min_size: int) -> None:
    try:
        width, height = verify_frames(data)
    except ValueError as error:
        raise BadSampleError("undecodable_image", str(error)) from error
    if min(width, height) < min_size:
        raise BadSampleError("too_small_image", f"{width}x{height} pixels, the shorter side under {min_size}")


def _check_encoded(members: dict[str, bytes], encoding: dict[str, Any]) -> None:
    if CODES not in members:
        raise BadSampleError("bad_codes", f"no {CODES} among its members {', '.join(sorted(members))}")
    codes = codes_of(members)
    if list(codes.shape) != list(encoding["grid"]):
        raise BadSampleError("bad_codes", f"grid {list(codes.shape)}, the encoding says {list(encoding['grid'])}")
    if codes.max(initial=0) >= encoding["codebook_size"]:
        raise BadSampleError("bad_codes", f"code {codes.max()} in a codebook of {encoding['codebook_size']}")
    caption_of(members, "caption")
    label_of(members)
    if (STATES in members) != (encoding["text_encoder_sha256"] is not None):
        raise BadSampleError("bad_states", f"{STATES} {'without' if STATES in members else 'missing for'} an encoder")
    if STATES in members:
        _check_states(members[STATES])


def _check_states(data: bytes) -> None:
    # The header is read by hand because safetensors' numpy side knows no bf16, and importing torch in every
    # process that verifies shards would cost more than verifying.
    try:
        length = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8 : 8 + length])["states"]
        tokens, channels = entry["shape"]
        whole = entry["dtype"] == "BF16" and len(data) == 8 + length + 2 * tokens * channels and tokens > 0
    except (ValueError, KeyError, TypeError) as error:
        raise BadSampleError("bad_states", f"{STATES} cannot be read: {error}") from error
    if not whole:
        raise BadSampleError("bad_states", f"{STATES} is {entry['dtype']} {entry['shape']} in {len(data)} bytes")


def _damage(scan: TarScan, name: str, good: int, rejected: list[Rejected]) -> list[Rejected]:
    """The damage of a tar as one more entry, or none when the last sample, left incomplete by the cut, takes
    it over.
    """
    damage = scan.damage
    if damage is None:
        return []
    key = damage.key
    last = scan.groups[-1].key if scan.groups else None
    cut_between_members = damage.cause == TRUNCATED and key is None and rejected and rejected[-1].key == last
    if cut_between_members and rejected[-1].cause in ("missing_image", "missing_caption"):
        key = rejected.pop().key
    return [Rejected(key, name, damage.cause, f"{damage.detail}; the {good} good samples before it are kept")]
