import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from data_pipeline.clips import clip_sample
from data_pipeline.images import open_frames, open_rgb
from data_pipeline.index import ShardSet, build_index
from data_pipeline.shapes import SHAPES, ShapesSample, single_object_sample, training_sample
from data_pipeline.shapes_set import FRAME_MS, write_shards


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_shards_have_the_same_bytes_whoever_writes_them(tmp_path: Path) -> None:
    write_shards(tmp_path / "one", 25, seed=1, shard_size=10, workers=1)
    write_shards(tmp_path / "two", 25, seed=1, shard_size=10, workers=2)
    assert list(tars(tmp_path / "one")) == [f"shapes-{n:06d}.tar" for n in range(3)]
    assert tars(tmp_path / "one") == tars(tmp_path / "two")
    write_shards(tmp_path / "other", 25, seed=2, shard_size=10, workers=1)
    assert all(a != b for a, b in zip(tars(tmp_path / "one").values(), tars(tmp_path / "other").values(), strict=True))


def test_an_interrupted_set_is_finished_without_touching_what_is_there(tmp_path: Path) -> None:
    write_shards(tmp_path, 25, shard_size=10, workers=1)
    whole = tars(tmp_path)
    (tmp_path / "shapes-000001.tar").unlink()
    (tmp_path / ".shapes-000001.tar.partial.host.1").write_bytes(b"half")
    kept = (tmp_path / "shapes-000002.tar").stat().st_mtime_ns
    write_shards(tmp_path, 25, shard_size=10, workers=1)
    assert tars(tmp_path) == whole
    assert (tmp_path / "shapes-000002.tar").stat().st_mtime_ns == kept


def test_an_indexed_set_that_is_made_again_is_none_until_it_is_indexed(tmp_path: Path) -> None:
    write_shards(tmp_path, 12, shard_size=10, workers=1)
    build_index(tmp_path, progress=False)
    write_shards(tmp_path, 12, shard_size=10, workers=1)
    assert len(ShardSet(tmp_path)) == 12, "nothing was written, so the index is still right"
    (tmp_path / "shapes-000001.tar").unlink()
    write_shards(tmp_path, 12, shard_size=10, workers=1)
    assert not (tmp_path / "manifest.json").exists()


def test_a_set_made_with_other_numbers_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, 12, shard_size=10, workers=1)
    before = tars(tmp_path)
    for numbers in ({"samples": 13}, {"samples": 12, "seed": 1}, {"samples": 12, "shard_size": 6}):
        with pytest.raises(ValueError, match="choose another folder"):
            write_shards(tmp_path, **{"shard_size": 10, "workers": 1} | numbers)
    assert tars(tmp_path) == before
    (tmp_path / "shapes.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="choose another folder"):
        write_shards(tmp_path, 12, shard_size=10, workers=1)


def test_other_tars_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shapes-000000.tar").write_bytes(b"of another set")
    with pytest.raises(ValueError, match=r"shapes-000000\.tar was not made by this command; choose another folder"):
        write_shards(tmp_path, 12, shard_size=10, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes-000000.tar"]


@pytest.mark.parametrize("numbers", [{"samples": 0}, {"shard_size": 0}, {"workers": 0}, {"samples": -5}])
def test_numbers_below_one_are_refused(tmp_path: Path, numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        write_shards(tmp_path / "out", **{"samples": 4} | numbers)
    assert not (tmp_path / "out").exists()


def test_shards_hold_the_samples(tmp_path: Path) -> None:
    write_shards(tmp_path, 25, shard_size=10, workers=1)
    build_index(tmp_path, progress=False)
    shards = ShardSet(tmp_path)
    assert len(shards) == 25
    keys = [shards.key(i) for i in range(25)]
    assert all(int(b) - int(a) == 1 for a, b in pairwise(keys))
    for i in range(25):
        sample = training_sample(0, i)
        assert_holds(shards, i, sample)


def assert_holds(shards: ShardSet, i: int, sample: ShapesSample) -> None:
    read = shards.read_raw(i)
    np.testing.assert_array_equal(np.asarray(open_rgb(read.image)), sample.image)
    assert read.caption == sample.caption
    assert read.label == SHAPES.index(sample.objects[0].shape)
    assert json.loads(shards.members(i, ["json"])["json"]) == sample.metadata


def test_members_and_records_of_the_set_for_text_models_stay_as_they_are(tmp_path: Path) -> None:
    write_shards(tmp_path, 2, seed=5, shard_size=2, workers=1)
    assert (tmp_path / "shapes.json").read_text() == '{"samples": 2, "seed": 5, "shard_size": 2}'
    samples = list(webdataset.WebDataset(str(tmp_path / "shapes-000000.tar"), shardshuffle=False))
    members = [[name for name in sample if not name.startswith("__")] for sample in samples]
    assert members == [["png", "txt", "cls", "json"]] * 2


def test_sets_of_single_objects(tmp_path: Path) -> None:
    write_shards(tmp_path, 7, seed=2, shard_size=4, workers=1, single_object=True)
    build_index(tmp_path, progress=False)
    shards = ShardSet(tmp_path)
    assert len(shards) == 7
    for i in range(7):
        assert_holds(shards, i, single_object_sample(2, i))


@pytest.mark.parametrize("frames", [3, 4, 6])
def test_sets_of_clips_hold_every_frame_exactly(tmp_path: Path, frames: int) -> None:
    write_shards(tmp_path, 7, seed=2, shard_size=4, workers=2, frames=frames)
    manifest = build_index(tmp_path, progress=False)
    assert manifest.members == {"cls": 7, "txt": 7, "webp": 7}
    shards = ShardSet(tmp_path)
    for i in range(7):
        read, sample = shards.read_raw(i), clip_sample(2, i, frames)
        assert (read.caption, read.label) == (sample.caption, sample.label)
        np.testing.assert_array_equal(np.stack([np.asarray(f) for f in open_frames(read.image)]), sample.frames)
    assert FRAME_MS >= 10


@pytest.mark.parametrize("changes", [{"single_object": True}, {"frames": 4}])
def test_sets_of_another_kind_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_shards(tmp_path, 2, shard_size=2, workers=1)
    with pytest.raises(ValueError, match=r"holds shapes made with .*; choose another folder"):
        write_shards(tmp_path, 2, shard_size=2, workers=1, **changes)


def test_clips_that_cannot_be_made_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for frames in (0, 2, 7):
        with pytest.raises(ValueError, match=rf"clips of {frames} frames cannot be made: .* give 3 to 6"):
            write_shards(tmp_path / "out", 2, frames=frames)
    with pytest.raises(ValueError, match="give --frames or --single-object, not both"):
        write_shards(tmp_path / "out", 2, frames=4, single_object=True)
    assert not (tmp_path / "out").exists()
