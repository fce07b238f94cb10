import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_pipeline.encode import encode_set
from data_pipeline.images import CROP_POLICY, animation, center_crop_resize, open_rgb
from data_pipeline.index import ShardSet, build_index, load_quarantine
from data_pipeline.loader import BatchLoader, LaneOrder, collate_codes
from data_pipeline.verify import CODES, STATES

RawSet = Callable[..., Path]
SIZE, GRID = 16, (2, 2)
ENCODING: dict[str, Any] = {
    "tokenizer_sha256": "0" * 64,
    "text_encoder_sha256": None,
    "crop": CROP_POLICY,
    "image_size": SIZE,
    "grid": GRID,
    "codebook_size": 256,
}
WITH_TEXT = {**ENCODING, "text_encoder_sha256": "1" * 64}


def encode_images(images: np.ndarray) -> np.ndarray:
    """The mean of each quarter: a tokenizer that is easy to check."""
    assert images.dtype == np.uint8
    assert images.shape[1:] == (SIZE, SIZE, 3)
    quarters = images.reshape(len(images), 2, SIZE // 2, 2, SIZE // 2, 3)
    return np.asarray(quarters.mean((2, 4, 5)), np.int64)


def encode_text(captions: list[str]) -> list[torch.Tensor]:
    return [torch.arange(len(caption) * 3, dtype=torch.float32).reshape(-1, 3) for caption in captions]


class Counting:
    """Encodes as `encode_images` does, counts pictures, and fails after `limit` of them."""

    def __init__(self, limit: int = 10**9) -> None:
        self.seen, self.limit = 0, limit

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.seen += len(images)
        if self.seen > self.limit:
            raise KeyboardInterrupt
        return encode_images(images)


def run(raw: Path, out: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "encode_images": encode_images,
        "encode_text": None,
        "image_size": SIZE,
        "encoding": ENCODING,
        "batch_size": 3,
        "progress": False,
    }
    return encode_set(raw, out, **{**options, **changes})


@pytest.fixture
def raw(raw_set: RawSet) -> Path:
    root = raw_set(4, 7, labels=True)
    build_index(root, progress=False)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.tar")}


def test_codes_captions_and_labels_arrive(raw: Path, tmp_path: Path) -> None:
    manifest = run(raw, tmp_path / "out")
    assert (manifest.kind, manifest.samples, manifest.read) == ("encoded", 28, 28)
    assert manifest.encoding == {**ENCODING, "grid": list(GRID)}
    source, encoded = ShardSet(raw), ShardSet(tmp_path / "out")
    assert encoded.manifest == manifest
    for i in range(28):
        before, after = source.read_raw(i), encoded.read_encoded(i)
        expected = encode_images(center_crop_resize(open_rgb(before.image), SIZE)[None])[0]
        assert np.array_equal(after.codes, expected)
        assert after.codes.dtype == np.uint16
        assert (after.key, after.caption, after.label, after.states) == (
            before.key,
            before.caption,
            before.label,
            None,
        )


def test_text_states_are_stored_unpadded_in_bf16(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "out", encode_text=encode_text, encoding=WITH_TEXT)
    encoded = ShardSet(tmp_path / "out")
    for i in (0, 27):
        sample = encoded.read_encoded(i)
        assert sample.states is not None
        assert sample.states.dtype == torch.bfloat16
        assert torch.equal(sample.states, encode_text([sample.caption])[0].to(torch.bfloat16))
    assert encoded.read_encoded(0, [CODES, "txt"]).states is None


def test_webdataset_reads_encoded_shards(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "out")
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "00001.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(7, 14)]
    assert samples[0]["codes.npy"].shape == GRID
    assert (samples[0]["txt"], samples[0]["cls"]) == ("a 7", 7)


def test_any_number_of_ranks_and_batch_size_gives_the_same_files(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "one")
    manifests = [run(raw, tmp_path / "three", rank=rank, ranks=3, batch_size=64) for rank in (2, 0, 1)]
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert manifests[:2] == [None, None], "the manifest comes from the rank that finds all finished"
    assert manifests[2].digest == ShardSet(tmp_path / "one").manifest.digest


def test_an_interrupted_run_goes_on_where_it_stopped(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(raw, out, encode_images=Counting(limit=18))
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert not (out / "manifest.json").exists()
    rest = Counting()
    run(raw, out, encode_images=rest)
    assert rest.seen == 14
    assert contents(out) == contents(tmp_path / "whole")
    again = Counting()
    run(raw, out, encode_images=again)
    assert again.seen == 0


def test_a_killed_run_leaves_a_temporary_file_that_the_next_replaces(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import test_encode as t; from pathlib import Path\n"
        "seen = t.Counting()\n"
        "def kill(images):\n"
        "    codes = seen(images)\n"
        "    if seen.seen > 12: os.kill(os.getpid(), 9)\n"
        "    return codes\n"
        "t.run(Path(sys.argv[2]), Path(sys.argv[3]), encode_images=kill)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(raw), str(out)], check=False)
    assert done.returncode == -9
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar"]
    assert [path.name for path in out.glob(".*partial*")] == [".00001.tar.partial"]
    assert run(raw, out).samples == 28
    assert list(out.glob(".*partial*")) == []


@pytest.mark.parametrize(
    ("field", "value"), [("tokenizer_sha256", "f" * 64), ("codebook_size", 512), ("note", "another")]
)
def test_another_encoding_in_the_same_folder_is_refused(raw: Path, tmp_path: Path, field: str, value: object) -> None:
    run(raw, tmp_path / "out")
    with pytest.raises(ValueError, match=rf"encoded differently \({field} .* there, .* now\): choose another out"):
        run(raw, tmp_path / "out", encoding={**ENCODING, field: value})


def test_a_raw_shard_that_changed_is_encoded_again(raw: Path, tmp_path: Path, raw_set: RawSet) -> None:
    out = tmp_path / "out"
    run(raw, out)
    (raw / "00002.tar").write_bytes((raw / "00002.tar").read_bytes()[:4000])
    build_index(raw, progress=False)
    counting = Counting()
    manifest = run(raw, out, encode_images=counting)
    assert 0 < counting.seen < 7
    assert manifest.samples == 21 + counting.seen


def test_a_set_that_is_encoded_again_is_none_until_it_is_whole(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(raw, out)
    run(raw, out)
    assert len(ShardSet(out)) == 28, "nothing was written, so the index is still right"
    path = raw / "00002.tar"
    path.write_bytes(path.read_bytes().replace(b"a 15", b"b 15"))
    build_index(raw, progress=False)
    with pytest.raises(KeyboardInterrupt):
        run(raw, out, encode_images=Counting(limit=3))
    assert not (out / "manifest.json").exists()
    assert run(raw, out).samples == 28


def test_an_encoded_shard_that_was_damaged_is_encoded_again(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(raw, out)
    whole = contents(out)
    (out / "00001.tar").write_bytes(whole["00001.tar"][:6000])
    counting = Counting()
    assert run(raw, out, encode_images=counting).samples == 28
    assert counting.seen == 7
    assert contents(out) == whole


def test_raw_shards_without_good_samples_are_passed_over(raw_set: RawSet, tmp_path: Path) -> None:
    root = raw_set(3, 4)
    (root / "00001.tar").write_bytes(b"broken" * 200)
    build_index(root, progress=False)
    manifest = run(root, tmp_path / "out")
    assert [shard.name for shard in manifest.shards] == ["00000.tar", "00002.tar"]
    assert run(root, tmp_path / "out").samples == 8


def test_what_was_set_aside_is_not_encoded(raw_set: RawSet, tmp_path: Path) -> None:
    root = raw_set(2, 4)
    (root / "00002.tar").write_bytes((root / "00001.tar").read_bytes())
    build_index(root, progress=False)
    assert run(root, tmp_path / "out").samples == 8


def test_mistakes_are_refused_before_anything_is_written(raw: Path, raw_set: RawSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"encoding": {**ENCODING, "crop": "fit"}}, "crop policy 'fit' is unknown"),
        ({"image_size": 32}, "says 16 pixels, image_size is 32"),
        ({"encoding": {**ENCODING, "codebook_size": 70000}}, "70000 does not fit"),
        ({"encoding": {k: v for k, v in ENCODING.items() if k != "grid"}}, "lacks grid"),
        ({"encode_text": encode_text}, "give both or neither"),
        ({"encoding": WITH_TEXT}, "give both or neither"),
        ({"batch_size": 0}, "batch size 0 holds no sample"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            run(raw, out, **changes)
    with pytest.raises(ValueError, match="cannot replace the raw one"):
        run(raw, raw)
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        run(tmp_path / "nowhere", out)
    assert not out.exists()
    run(raw, out)
    with pytest.raises(ValueError, match="encoded already"):
        run(out, tmp_path / "twice")
    (out / "extra.tar").write_bytes((out / "00000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"holds extra\.tar, which"):
        run(raw, out)


def test_indexing_an_encoded_set_verifies_it(raw: Path, tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    first = run(raw, out, encode_text=encode_text, encoding=WITH_TEXT)
    for path in out.glob("*.npz"):
        path.unlink()
    assert build_index(out, progress=False) == first
    from data_pipeline.tars import ShardWriter
    from data_pipeline.verify import ENCODING_RECORD

    good = ShardSet(out).members(0)
    wrong_states = good[STATES].replace(b"BF16", b"F16 ")
    cases = [
        ({**good, CODES: good[CODES][:-1]}, "bad_codes"),
        ({**good, CODES: good[CODES].replace(b"(2, 2)", b"(4, 1)")}, "bad_codes"),
        ({**good, CODES: good[CODES][:-2] + b"\0\1"}, "bad_codes"),
        ({k: v for k, v in good.items() if k != CODES}, "bad_codes"),
        ({**good, "txt": b""}, "empty_caption"),
        ({**good, STATES: good[STATES][:-1]}, "bad_states"),
        ({**good, STATES: wrong_states}, "bad_states"),
        ({k: v for k, v in good.items() if k != STATES}, "bad_states"),
        (good, None),
    ]
    other = tmp_path / "other"
    with ShardWriter(other / "0.tar", {ENCODING_RECORD: json.dumps(WITH_TEXT)}) as writer:
        for number, (members, _) in enumerate(cases):
            writer.add(f"{number}", members)
    build_index(other, progress=False)
    assert [entry.cause for entry in load_quarantine(other)] == [cause for _, cause in cases if cause]


def test_shards_of_different_kinds_or_encodings_do_not_mix(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "a")
    run(raw, tmp_path / "b", encoding={**ENCODING, "tokenizer_sha256": "9" * 64})
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "0.tar").write_bytes((tmp_path / "a" / "00000.tar").read_bytes())
    (mixed / "1.tar").write_bytes((tmp_path / "b" / "00001.tar").read_bytes())
    with pytest.raises(ValueError, match=r"0\.tar and 1\.tar .* encoded differently"):
        build_index(mixed, progress=False)
    (mixed / "1.tar").write_bytes((raw / "00001.tar").read_bytes())
    with pytest.raises(ValueError, match="mixes raw and encoded"):
        build_index(mixed, progress=False)


def test_an_encoded_set_is_trained_on_through_the_loader(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "out")
    encoded = ShardSet(tmp_path / "out")
    order = LaneOrder(0, len(encoded), 4, seed=1)
    with BatchLoader(encoded, order, 8, 1, 2, 3, collate_codes) as loader:
        step, batch = next(loader)
    numbers = order.indices(3, 8, 1, 2)
    assert step == 3
    assert batch["codes"].shape == (4, *GRID)
    assert batch["captions"] == [f"a {i}" for i in numbers]
    assert batch["labels"].tolist() == [i % 10 for i in numbers]


# Clips


def encode_clips(clips: np.ndarray) -> np.ndarray:
    assert clips.ndim == 5
    return np.stack([encode_images(clip) for clip in clips])


def clip(number: int, frames: int = 4) -> list[Image.Image]:
    return [Image.new("RGB", (SIZE, SIZE), (number * 9, t * 40, 7)) for t in range(frames)]


def clip_options(frames: int) -> dict[str, Any]:
    return {
        "encode_images": encode_clips,
        "frames": frames,
        "encoding": {**ENCODING, "grid": (frames, *GRID), "frames": frames},
    }


@pytest.fixture
def raw_clips(tmp_path: Path, write_tar: Callable[..., Path]) -> Path:
    for shard in range(2):
        members = []
        for number in range(shard * 4, shard * 4 + 4):
            members += [
                (f"{number}.webp", animation(clip(number), "WEBP", 100)),
                (f"{number}.txt", b"a clip"),
                (f"{number}.cls", b"%d" % number),
            ]
        write_tar(f"clips/{shard}.tar", members)
    build_index(tmp_path / "clips", progress=False)
    return tmp_path / "clips"


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_the_first_frames_of_clips_are_encoded(raw_clips: Path, tmp_path: Path, frames: int) -> None:
    manifest = run(raw_clips, tmp_path / "out", **clip_options(frames))
    assert manifest.encoding == {**ENCODING, "grid": [frames, *GRID], "frames": frames}
    encoded = ShardSet(tmp_path / "out")
    for i in range(8):
        sample = encoded.read_encoded(i)
        pixels = np.stack([np.asarray(frame) for frame in clip(i)[:frames]])
        assert sample.codes.dtype == np.uint16
        np.testing.assert_array_equal(sample.codes, encode_images(pixels))
        assert (sample.caption, sample.label) == ("a clip", i)
    batch = collate_codes([encoded.read_encoded(i) for i in range(3)])
    assert batch["codes"].shape == (3, frames, *GRID)


def test_of_clips_that_are_encoded_as_stills_the_first_frame_counts(raw_clips: Path, tmp_path: Path) -> None:
    manifest = run(raw_clips, tmp_path / "out")
    assert "frames" not in manifest.encoding  # recorded as pictures always were
    np.testing.assert_array_equal(
        ShardSet(tmp_path / "out").read_encoded(5).codes, encode_images(np.asarray(clip(5)[0])[None])[0]
    )


def test_a_clip_with_too_few_frames_is_named(raw_clips: Path, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample '0' of shard .*0\.tar has 4 of 5 frames: ask for fewer"):
        run(raw_clips, tmp_path / "out", **clip_options(5))
    with pytest.raises(ValueError, match=r"sample '000000' of shard .*00000\.tar has 1 of 4 frames"):
        run(raw, tmp_path / "out", **clip_options(4))


def test_clips_and_what_is_said_of_them_have_to_agree(raw_clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changes, message in (
        ({"frames": 3}, "the encoding says 4 frames, frames is 3"),
        ({"frames": None}, "the encoding says 4 frames, frames is None"),
        ({"encoding": ENCODING}, "the encoding says None frames, frames is 4"),
        (clip_options(0), "clips of 0 frames hold nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            run(raw_clips, out, **(clip_options(4) | changes))
    assert not out.exists()
    run(raw_clips, out)
    with pytest.raises(ValueError, match=r"encoded differently \(grid .*frames None there, 4 now\)"):
        run(raw_clips, out, **clip_options(4))
