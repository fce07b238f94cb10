"""`t2i bench loader` end to end on small sets: both ways give the same samples, and the tables say what they should."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.encode import encoded_members
from data_pipeline.index import ShardSet, build_index
from data_pipeline.tars import ShardWriter
from data_pipeline.verify import ENCODING_RECORD
from t2i import cli
from t2i.bench import large_sets, page_cache
from t2i.bench.loader import contents, ours, plain_webdataset
from t2i.bench.sets import simulate_set, write_set

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux forgets files on request")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 samples with text states, in 3 shards."""
    root = tmp_path_factory.mktemp("sets") / "encoded"
    write_set(root, 48, 16, 4, 3)
    return root


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["t2i", "bench", "loader", *args])
    cli.main()


@pytest.mark.parametrize("workers", [1, 2])
def test_both_ways_give_the_same_samples_with_the_same_contents(encoded: Path, workers: int) -> None:
    whole = contents(ours(encoded, 8, 4, workers))
    assert whole == contents(plain_webdataset(encoded, 8, 10, workers))
    assert set(whole.values()) == {1}
    assert len(whole) == 48


@pytest.mark.parametrize("labelled", [True, False])
def test_contents_tell_samples_apart(tmp_path: Path, labelled: bool) -> None:
    states_LC = torch.ones(2, 3)
    codes = torch.zeros(2, 2).numpy()
    others = [
        (codes, "a", 1, states_LC),
        (codes + 1, "a", 1, states_LC),
        (codes, "b", 1, states_LC),
        (codes, "a", 1, states_LC * 2),
        (codes, "a", 1, states_LC.T),
        (codes, "a", 2, states_LC),
    ]
    encoding = {"grid": [2, 2], "codebook_size": 4, "text_encoder_sha256": "1" * 64}
    with ShardWriter(tmp_path / "0.tar", {ENCODING_RECORD: json.dumps(encoding)}) as writer:
        for n, (codes, caption, label, states) in enumerate(others):
            writer.add(str(n), encoded_members(codes, caption, label if labelled else None, states))
    build_index(tmp_path, progress=False)
    found = contents(ours(tmp_path, 2, 1, 1))
    assert sorted(found.values()) == [1] * 6 if labelled else [1, 1, 1, 1, 2]


def test_what_is_left_of_whole_batches_is_not_read(encoded: Path) -> None:
    found = contents(ours(encoded, 20, 4, 1))
    assert found.total() == len(found) == 40
    assert found < contents(plain_webdataset(encoded, 20, 0, 1))


@LINUX
def test_rows_of_reading(encoded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        monkeypatch,
        "--data",
        str(encoded),
        "--batch",
        "8",
        "--lanes",
        "4",
        "--repeats",
        "2",
        "--caches",
        "cold",
        "--json",
    )
    result = json.loads(capsys.readouterr().out)
    assert (result["header"]["samples"], result["header"]["shards"], result["index"]) == ("48", 3, [])
    rows = {(row["variant"], row["workers"], row["cache"]): row for row in result["rows"]}
    assert set(rows) == {(v, n, "cold") for v in ("ours", "webdataset") for n in (1, 2)}
    size = sum(path.stat().st_size for path in encoded.glob("*.tar"))
    for (variant, workers, cache), row in rows.items():
        assert row["samples"] == 40, "the first batch is not timed"
        assert row["samples_per_s"] == pytest.approx(statistics.median(40 / s for s in row["seconds"]))
        assert row["shards_per_s"] == pytest.approx(row["samples_per_s"] / 16)
        assert row["mib_per_s"] == pytest.approx(row["samples_per_s"] / 48 * size / 2**20)
        assert len(row["seconds"]) == len(row["first_batch"]) == 2
        assert min(row["first_batch"]) > 0
        if variant == "ours":
            times = row["samples_per_s"] / rows["webdataset", workers, cache]["samples_per_s"]
            assert row["of_webdataset"] == pytest.approx(times)


def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--samples", "24", "--shard-samples", "12", "--grid", "2", "--batch", "4", "--lanes", "2", "--repeats", "1"]
    run(monkeypatch, *args, "--workers", "1", "--caches", "warm")
    table = capsys.readouterr().out
    assert "webdataset, 1, warm" in table
    assert "torch " + torch.__version__ in table
    assert "index of large sets" not in table


@LINUX
def test_the_index_of_a_simulated_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "--simulate",
        "0.0005",
        "--shard-samples",
        "50",
        "--grid",
        "2",
        "--batch",
        "8",
        "--lanes",
        "4",
        "--repeats",
        "2",
    ]
    run(monkeypatch, *args, "--caches", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == []
    (row,) = result["index"]
    assert (row["samples"], row["shards"]) == (500, 10)
    for cache in ("warm", "cold"):
        assert all(0 < o < f for o, f in zip(row[f"open_{cache}"], row[f"first_batch_{cache}"], strict=True))
        assert len(row[f"processor_{cache}"]) == 2
        assert min(row[f"processor_{cache}"]) > 0
    run(monkeypatch, *args, "--caches")
    assert "│ 500 " in capsys.readouterr().out


def test_a_simulated_set_is_what_its_index_says(tmp_path: Path) -> None:
    manifest = simulate_set(tmp_path, 45, 20, 3)
    assert (manifest.samples, len(manifest.shards)) == (60, 3)
    shards = ShardSet(tmp_path)
    assert [shards.key(i) for i in range(60)] == [f"{i:09d}" for i in range(60)]
    assert shards.read_encoded(45).codes.tolist() == shards.read_encoded(5).codes.tolist()
    assert len({path.stat().st_ino for path in tmp_path.glob("*.tar")}) == 1


def test_memory_grows_with_the_index(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    simulate_set(small, 400, 200, 2)
    simulate_set(large, 2000, 200, 2)
    # Nine bytes of key, and six numbers of two to four bytes, a sample; a little for each shard.
    grown = large_sets.memory(large) - large_sets.memory(small)
    assert 1600 * 20 < grown < 1600 * 33 + 8 * 4000


@LINUX
def test_files_can_be_forgotten(tmp_path: Path) -> None:
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_bytes(bytes(10_000))
    empty.write_bytes(b"")
    assert page_cache.share_in_memory([file, empty]) == 1.0
    page_cache.drop([file, empty])
    # A file system in memory, as /tmp may be, has nowhere else to keep it.
    assert page_cache.share_in_memory([file]) in (0.0, 1.0)
    assert page_cache.share_in_memory([empty]) == 0.0


def test_systems_that_forget_nothing_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.posix_fadvise", raising=False)
    with pytest.raises(ValueError, match="measure with --caches warm"):
        page_cache.drop([tmp_path])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--samples", "0"], "have to be at least 1"),
        (["--workers", "0"], "have to be at least 1"),
        (["--workers"], "have to be at least 1"),
        (["--simulate", "-1"], "have to be at least 0"),
        (["--samples", "100", "--shard-samples", "50"], "100 samples are fewer than three batches of 256"),
        (["--batch", "100"], "global batch 100 is not divisible by 64 lanes"),
        (["--workers", "5"], "4 shards are fewer than 5 workers"),
        (["--data", "{nowhere}"], "has no manifest.json"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *[arg.format(nowhere=tmp_path) for arg in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"txt": b"x"}], "holds raw pictures"),
        ([{"label": 1}, {"caption": " "}], "has quarantined samples"),
        ([{"label": 1}, {}], "1 of 2 samples of .* have classes"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    samples: list[dict[str, object]],
    message: str,
) -> None:
    encoding = {"grid": [2, 2], "codebook_size": 4, "text_encoder_sha256": None}
    raw = "txt" in samples[0]
    with ShardWriter(tmp_path / "0.tar", {} if raw else {ENCODING_RECORD: json.dumps(encoding)}) as writer:
        for n, sample in enumerate(samples):
            members = {"txt": b"x"}
            if not raw:
                label, caption = sample.get("label"), str(sample.get("caption", "a"))
                assert label is None or isinstance(label, int)
                members = encoded_members(torch.zeros(2, 2).numpy(), caption, label)
            writer.add(str(n), members)
    build_index(tmp_path, progress=False)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--data", str(tmp_path), "--batch", "1", "--lanes", "1")
    error = capsys.readouterr().err
    assert re.search(message, error)
