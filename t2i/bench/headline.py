"""The whole life of the headline model on this machine: `t2i bench headline --out FOLDER`.

NAR-XL with text states of the published width takes three optimizer steps on real shards, with ZeRO 2 on one rank and with
ZeRO 3 on two, saves after two and goes on, is exported, and draws one picture of 256 pixels. Tokenizer, text encoder and
model have random weights: what is shown is that it fits and works, not what it draws. Takes about 50 GB of disk and, on two
cores, half an hour.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from data_pipeline.index import ShardSet, build_index
from data_pipeline.shapes_set import write_shards
from t2i.bench.measure import as_json, environment
from t2i.config import DataConfig, Recipe, to_json
from t2i.encoding import encode
from t2i.memory import Arrangement, memory
from t2i.recipes import nar_xl_256
from t2i.text_encoder import TextEncoder, TextEncoderConfig, train_sentencepiece
from t2i.vq import VQConfig, VQModel

SAMPLES = 24
STEPS = 3
PIECES = 300
PROMPT = "a photo of a red circle"
_ZERO: dict[str, Any] = {"overlap_comm": False, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO 2, one rank": (1, {"stage": 2, **_ZERO}),
    "ZeRO 3, two ranks": (2, {
        "stage": 3, **_ZERO, "sub_group_size": 100_000_000,
        # Each rank would hold the whole model otherwise, from the first forward pass on.
        "stage3_max_live_parameters": 100_000_000, "stage3_max_reuse_distance": 100_000_000,
    }),
}  # fmt: skip
"""Ranks and `zero_optimization` of each."""
# What the C library keeps back of freed memory would otherwise not leave room for the model.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


@dataclass(frozen=True)
class HeadlineRow:
    """What was measured of one arrangement. Seconds of the wall clock, GiB of all processes together."""

    way: str
    ranks: int
    step_seconds: float
    peak_gib: float
    """Of training; processes and libraries, about a GiB a rank, included."""
    planned_gib: float
    """What `t2i.memory`, behind `t2i plan`, says that the ranks hold at most, without the former."""
    first_run: float
    resumed_run: float
    export_seconds: float
    sample_seconds: float
    checkpoint_gib: float


def bench_headline(out: Path, ways: Sequence[str], *, batch: int, json_output: bool) -> list[HeadlineRow]:
    """Do all of it under `out`, and print a table, or JSON. Raises ValueError for a way that does not exist."""
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"no arrangement {unknown[0]!r}; there are {', '.join(WAYS)}")
    out = out.resolve()
    recipe = prepare(out)
    rows = [_one(recipe, way, out, batch) for way in ways]
    header = environment(torch.device("cpu")) | {"samples a rank": batch}
    if json_output:
        print(as_json(header, rows))
        return rows
    table = Table(
        title="t2i bench headline: NAR-XL, 16x16 tokens, activation checkpointing, fp32", title_justify="left"
    )
    columns = (
        "",
        "s/step",
        "peak GiB",
        "planned GiB",
        "2 steps and save, s",
        "resume, 1 step, save, s",
        "export, s",
        "sample, s",
        "ckpt GiB",
    )
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        numbers = (
            row.step_seconds, row.peak_gib, row.planned_gib, row.first_run, row.resumed_run, row.export_seconds,
            row.sample_seconds, row.checkpoint_gib,
        )  # fmt: skip
        table.add_row(row.way, *(f"{number:.1f}" for number in numbers))
    Console(width=140).print(table)
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    return rows


def prepare(out: Path) -> Recipe:
    """Tokenizer, text encoder and encoded shards under `out`, where they are not there yet; returns the recipe."""
    torch.manual_seed(0)
    raw, encoded = out / "raw", out / "encoded"
    if not (encoded / "manifest.json").exists():
        write_shards(raw, samples=SAMPLES, shard_size=SAMPLES, seed=0, workers=1)
        build_index(raw, progress=False)
        VQModel(VQConfig()).save(out / "vq-16")
        captions = [ShardSet(raw).read_raw(i).caption for i in range(SAMPLES)]
        train_sentencepiece(captions, PIECES, out / "spiece.model")
        config = TextEncoderConfig(vocab_size=PIECES, dim=2048, n_layer=2, n_head=32, ffn_dim=5120)
        TextEncoder.from_config(config, (out / "spiece.model").read_bytes()).save_pretrained(out / "t5")
        encode(raw, encoded, tokenizer=str(out / "vq-16"), image_size=256, text_encoder=str(out / "t5"), batch_size=4)
    published = nar_xl_256()
    train = replace(
        published.train, steps=STEPS, warmup_steps=0, log_every=1, validate_every=10**6, save_every=STEPS - 1, keep_last=1,
        ema_decay=0.0, background_save=False, activation_checkpointing=True, wandb="disabled",
    )  # fmt: skip
    data = DataConfig(path=encoded, lanes=2, workers=1, validation=0)
    return replace(published, tokenizer=str(out / "vq-16"), frozen_text_encoder=str(out / "t5"), data=data, train=train)


def _one(recipe: Recipe, way: str, out: Path, batch: int) -> HeadlineRow:
    ranks, zero = WAYS[way]
    folder = out / f"zero{zero['stage']}"
    folder.mkdir(exist_ok=True)
    recipe = replace(recipe, run_dir=folder / "run")
    (folder / "recipe.json").write_text(to_json(recipe))
    config = {
        # The global batch has to be a multiple of the lanes.
        "train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": 2 // ranks, "gradient_clipping": 1.0,
        "zero_optimization": zero,
    }  # fmt: skip
    (folder / "deepspeed.json").write_text(json.dumps(config))
    train = [
        _program("deepspeed"), "--num_accelerators", str(ranks), str(Path(__file__).parents[1] / "train.py"),
        str(folder / "recipe.json"), "--deepspeed_config", str(folder / "deepspeed.json"),
    ]  # fmt: skip
    first = _run([*train, "--train.steps", str(STEPS - 1)], ranks)
    resumed = _run(train, ranks)
    checkpoint = next((folder / "run" / "checkpoints").iterdir())
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    t2i = [sys.executable, "-m", "t2i.cli"]
    exported = _run([*t2i, "export", str(folder / "run"), "--out", str(folder / "export")], 1)
    sampled = _run(
        [*t2i, "sample", str(folder / "export"), PROMPT, "--images", "1", "--out", str(folder / "sample.png")], 1
    )
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), rows
    per_step = [2 // ranks * batch * ranks / row["samples_per_s"] for row in rows]
    states = [ShardSet(recipe.data.path).read_encoded(i).states for i in range(SAMPLES)]
    caption = max(len(one) for one in states if one is not None)
    planned = memory(recipe, Arrangement.of(config), ranks, caption, processor=True).peak
    return HeadlineRow(
        way, ranks, sum(per_step) / len(per_step), max(first[1], resumed[1]) / 2**30, ranks * planned / 2**30, first[0],
        resumed[0], exported[0], sampled[0], size / 2**30,
    )  # fmt: skip


def _program(name: str) -> str:
    """A program of this interpreter's environment."""
    return str(Path(sys.executable).parent / name)


def _run(command: list[str], ranks: int) -> tuple[float, int]:
    """Run a command; returns its seconds and the most bytes that it and its children held together, shared pages counted
    once. Raises ValueError with its last lines where it fails."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    begun, peak = time.perf_counter(), 0
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(threads), "PATH": path}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    while process.poll() is None:
        peak = max(peak, _held(process.pid))
        time.sleep(0.5)
    reader.join()
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed ({process.returncode}): {''.join(lines[-20:])}")
    return time.perf_counter() - begun, peak


def _held(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            try:
                total += int(process.memory_full_info().pss)
            except (psutil.Error, AttributeError):  # it has just ended, or another system
                continue
    except psutil.Error:
        return 0
    return total
