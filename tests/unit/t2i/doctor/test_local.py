import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from doctor_findings import plan
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import LaneOrder
from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.shard_index import Settings, index_path
from t2i.config import DataConfig, Recipe
from t2i.doctor.facts import Device
from t2i.doctor.local import gather_local, look_at_shards, needed_shards, versions
from t2i.recipes import shapes_tiny


def recipe_on(path: Path, lanes: int = 16, validation: int = 16) -> Recipe:
    return replace(shapes_tiny(), data=DataConfig(path=path, lanes=lanes, validation=validation))


@pytest.fixture
def shards(encoded_shapes: Path, tmp_path: Path) -> Path:
    """A set of 96 samples in two shards, to be damaged."""
    shutil.copytree(encoded_shapes, tmp_path / "set")
    return tmp_path / "set"


def test_a_whole_set(shards: Path) -> None:
    seen = look_at_shards(recipe_on(shards), 0, 1)
    assert (seen.error, seen.shards, seen.needed, seen.missing, seen.unreadable) == (None, 2, 2, (), ())
    assert seen.digest == look_at_shards(recipe_on(shards), 1, 2).digest


def test_a_set_with_a_hole(shards: Path) -> None:
    first = sorted(shards.glob("*.tar"))[0]
    first.unlink()
    seen = look_at_shards(recipe_on(shards), 1, 2)
    assert seen.missing == (first.name,)
    assert seen.error is not None
    assert first.name in seen.error
    assert look_at_shards(recipe_on(shards / "none"), 0, 1).error is not None


def test_shards_that_changed_or_lost_their_index(shards: Path) -> None:
    last = sorted(shards.glob("*.tar"))[-1]
    index_path(last).unlink()
    seen = look_at_shards(recipe_on(shards), 0, 1)
    assert (seen.error, seen.unreadable) == (None, (f"{last.name}: its index is missing or not of this set",))
    with open(last, "ab") as file:
        file.write(b"more")
    assert "bytes on disk" in str(look_at_shards(recipe_on(shards), 0, 1).error)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    validation=st.integers(0, 20),
    share=st.integers(1, 3),
    ranks=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_what_a_rank_needs_is_what_its_order_reads(
    sizes: list[int], validation: int, share: int, ranks: int, seed: int
) -> None:
    info = tuple(ShardInfo(f"{n}.tar", size, size, 1, 0, "") for n, size in enumerate(sizes))
    samples = sum(sizes)
    manifest = Manifest("encoded", Settings(), {}, info, samples, samples, {}, 0, {})
    lanes, train = share * ranks, samples - validation
    recipe = recipe_on(Path("x"), lanes, validation)
    ends = np.cumsum(sizes)
    for rank in range(ranks):
        needed = needed_shards(manifest, recipe, rank, ranks)
        if train < lanes:
            assert needed == list(range(len(sizes)))
            continue
        order = LaneOrder(0, train, lanes, seed)
        epoch = -(-train // lanes)
        read = {int(i) for step in range(epoch) for i in order.indices(step, lanes, rank, ranks)} | set(
            range(train, samples)
        )
        assert needed == sorted({int(np.searchsorted(ends, i, side="right")) for i in read})


def test_local_facts_of_the_rank_that_the_environment_names(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text("{}")
    made = replace(plan(init_from="no/export"), files=(tmp_path / "zero.json", tmp_path / "none.json"))
    made = replace(made, recipe=replace(made.recipe, data=DataConfig(path=shards, lanes=4, validation=0)))
    environ = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "NCCL_DEBUG": "INFO", "SECRET": "x",
        "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    facts = gather_local(made, Device("cpu", "cpu", 1, 0, True), "wrong", environ)
    assert (facts.rank, facts.ranks, facts.local_ranks, facts.node, facts.config_error) == (3, 4, 2, 1, "wrong")
    assert facts.variables == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2"}
    assert len(facts.files[str(tmp_path / "zero.json")]) == 64
    assert facts.files[str(tmp_path / "none.json")] == "cannot be read: No such file or directory"
    assert facts.init_error is not None
    assert facts.data.needed == 1  # the last quarter of the samples lies in one shard
    assert min(facts.cores, facts.memory) > 0


def test_versions_tell_an_edited_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = versions()
    assert before["torch"].startswith("2.")
    import t2i

    root = Path(t2i.__file__).parent.parent
    for package in ("t2i", "data_pipeline"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    monkeypatch.setattr(t2i, "__file__", str(tmp_path / "t2i" / "__init__.py"))
    assert versions() == before
    with open(tmp_path / "t2i" / "model.py", "a") as file:
        file.write("\n")
    assert versions()["source files"] != before["source files"]
