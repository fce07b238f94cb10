import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.loader import LaneOrder
from t2i import cli
from t2i.config import ModelConfig, Recipe, from_json, to_json
from t2i.engine import read_deepspeed_config
from t2i.memory import Arrangement
from t2i.plan import WAYS, Cluster, Plan, config_json, deepspeed_config, lanes_for, make_plan, needed, traffic
from t2i.plan_report import plan_json
from t2i.recipes import changed_recipe, nar_xl_256, nar_xl_512, nar_xxl, shapes_tiny

ROOT = Path(__file__).parents[3]
POD = Cluster(16, 8, "h100")


def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["t2i", "plan", *arguments])
    code: Any = 0
    try:
        cli.main()
    except SystemExit as exit:
        code = exit.code
    return int(code or 0), *capsys.readouterr()


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 12))
def test_lanes_are_such_that_the_loader_takes_them(lanes: int, ranks: int, each: int) -> None:
    batch = ranks * each
    found = lanes_for(lanes, batch, ranks)
    LaneOrder(0, 10_000, found).check(batch, ranks)
    if batch % lanes == 0 and lanes % ranks == 0:
        assert found == lanes


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("half", ["bf16", None])
def test_the_json_of_every_way_is_one_that_training_takes(name: str, half: str | None, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_bytes(config_json(deepspeed_config(name, 4, 2, nar_xl_256(), half)))
    config = read_deepspeed_config(path)
    assert config["zero_optimization"]["stage"] == int(name[5])
    assert Arrangement.of(config).half == (half is not None)


def test_what_is_recommended_fits_and_is_the_whole_batch() -> None:
    made = make_plan(nar_xl_256(), POD)
    assert made.config is not None
    size, accumulation = (
        made.config[name] for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    assert size * accumulation * POD.ranks == made.global_batch == 512
    assert made.lanes == 128
    assert needed(made.recipe, made.config, POD, made.checkpointing).peak <= POD.usable


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    made = make_plan(nar_xl_512(), Cluster(1, 8, "a100-40"))
    assert {way.name for way in made.ways} == set(WAYS)
    for way in made.ways:
        assert way.fits > 0
        for size, fits in ((way.fits, True), (way.fits + 1, False)):
            config = deepspeed_config(way.name, size, 1, made.recipe, "bf16")
            found = needed(made.recipe, config, made.cluster, way.checkpointing)
            assert (found.peak <= made.cluster.usable) == fits


def test_less_memory_recommends_what_takes_less() -> None:
    recipe = replace(nar_xl_512(), model=replace(nar_xxl(), grid=(32, 32)))
    order = [(name, again) for again in (False, True) for name in WAYS]
    places = []
    for gigabytes in (80, 24, 14, 9):
        made = make_plan(recipe, replace(POD, memory_gb=gigabytes))
        assert made.recommended is not None
        places.append(order.index((made.recommended, made.checkpointing)))
    assert places == sorted(places)
    assert places[0] == 0 < places[-1]
    none = make_plan(recipe, replace(POD, memory_gb=1))
    assert none.recommended is None
    assert none.config is None
    assert all(way.fits == 0 for way in none.ways)


def test_time_is_work_over_speed() -> None:
    made = make_plan(nar_xl_256(), POD)
    assert made.seconds == pytest.approx(made.flops / (128 * 989.4e12 * 0.4))
    assert make_plan(nar_xl_256(), replace(POD, mfu=0.2)).seconds == pytest.approx(2 * made.seconds)
    assert made.tokens == 468_750 * 512 * 256
    assert make_plan(nar_xl_256(), POD, caption_tokens=100).flops > made.flops


def test_traffic_of_the_stages() -> None:
    recipe = nar_xl_256()
    size = 2 * 818_971_648

    def sent(name: str, accumulation: int) -> float:
        return traffic(recipe, Arrangement.of(deepspeed_config(name, 1, accumulation, recipe, "bf16")), 128)

    share = size * 127 / 128
    assert [sent(f"ZeRO {stage}", 1) / share for stage in (1, 2, 3)] == pytest.approx([3, 3, 3])
    assert [sent(f"ZeRO {stage}", 4) / share for stage in (1, 2, 3)] == pytest.approx([3, 9, 12])
    assert traffic(recipe, Arrangement.of(deepspeed_config("ZeRO 3", 1, 1, recipe, "bf16")), 1) == 0


def test_the_data_is_counted_where_it_is(encoded_shapes: Path) -> None:
    tiny = shapes_tiny()
    recipe = replace(tiny, data=replace(tiny.data, path=encoded_shapes, validation=4, lanes=4))
    made = make_plan(recipe, Cluster(1, 2, "rtx4090"), global_batch=4)
    assert made.shards is not None
    assert made.samples is not None
    assert made.epochs == tiny.train.steps * 4 / (made.samples - 4)
    assert make_plan(recipe, Cluster(1, 2, "rtx4090"), global_batch=4, samples=10**6).shards == 1000
    with pytest.raises(ValueError, match="too few for"):
        make_plan(replace(recipe, data=replace(recipe.data, validation=made.samples - 1)), made.cluster, global_batch=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nar-xl-257"], "no recipe or file"),
        (["nar-xl-256", "--gpu", "h101"], "no GPU 'h101'; known are v100-16"),
        (["nar-xl-256", "--nodes", "0"], "0 nodes of 8 GPUs"),
        (["nar-xl-256", "--mfu", "40"], "mfu is 40.0"),
        (["nar-xl-256", "--gpu-memory", "-1"], "memory_gb is -1.0"),
        (["nar-xl-256", "--global-batch", "500"], "global batch 500 is not divisible by 8 GPUs; nearest: 496"),
        (
            ["nar-xl-256", "--micro-batch", "3"],
            "micro-batch 3 does not divide a rank's 64 of 512; it may be 1, 2, 4, 8",
        ),
        (["nar-xl-256", "--caption", "121"], "captions of 121 tokens are not within the 1 to 120"),
        (["nar-xl-256", "--samples", "5"], "5 samples leave none to train on"),
        (["nar-xl-256", "--gpu-memory", "0.5", "--out", "OUT"], "nothing to write"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    code, _, err = plan(capsys, monkeypatch, *(a.replace("OUT", str(tmp_path / "out.json")) for a in arguments))
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_command_prints_tables_and_writes_the_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "zero.json"
    options = ["nar-xl-256", "--nodes", "16", "--gpus-per-node", "8", "--gpu", "h100", "--samples", "4000000"]
    code, text, _ = plan(capsys, monkeypatch, *options, "--out", str(out))
    assert code == 0
    made = make_plan(nar_xl_256(), POD, samples=4_000_000)
    assert read_deepspeed_config(out) == made.config
    assert f"--deepspeed_config {out} --data.lanes 128" in text
    for part in ("818,971,648", "60.0 epochs", "250.0", "ZeRO 3, all off", "at an MFU of 0.4"):
        assert part in text
    code, text, _ = plan(capsys, monkeypatch, *options, "--json")
    assert json.loads(text) == json.loads(plan_json(made))
    assert json.loads(text)["ways"][0]["memory"]["peak"] == made.ways[0].memory.peak


def test_the_command_of_a_plan_starts_what_was_planned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Of a run that has a name like a recipe's, with other fields than that.
    first = replace(nar_xl_256(), model=replace(nar_xl_256().model, n_layer=2))
    file = tmp_path / "my run" / "recipe.json"
    file.parent.mkdir()
    file.write_text(to_json(first))
    changes = [
        "--train.steps",
        "77",
        "--data.lanes",
        "64",
        "--train.activation-checkpointing",
        "--data.path",
        "my data",
    ]
    where = ["--nodes", "16", "--gpus-per-node", "8"]
    code, text, _ = plan(capsys, monkeypatch, str(file), *where, *changes)
    assert code == 0
    command = shlex.split(text.splitlines()[-1])
    assert command[:4] == ["deepspeed", "--hostfile", "HOSTS", "t2i/train.py"]
    assert command[4:7] == [str(file), "--deepspeed_config", "plan.json"]
    started = changed_recipe(command[4], command[7:], "t2i/train.py")
    code, text, _ = plan(capsys, monkeypatch, str(file), *where, *changes, "--json")
    planned = from_json(Recipe, json.dumps(json.loads(text)["recipe"]))
    assert planned.model.n_layer == 2
    assert (planned.train.steps, planned.data.path) == (77, Path("my data"))
    data, train = replace(planned.data, lanes=128), replace(planned.train, activation_checkpointing=False)
    assert started == replace(planned, data=data, train=train)


def test_a_field_that_no_recipe_has_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan(capsys, monkeypatch, "nar-xl-256", "--train.step", "5")[0] == 2
    code, _, err = plan(capsys, monkeypatch, "nar-xl-256", "--train.steps", "-5")
    assert code == 2
    assert "TrainConfig: steps is -5" in err


def test_a_plan_in_which_nothing_fits_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text, _ = plan(capsys, monkeypatch, "nar-xl-256", "--gpu-memory", "0.5")
    assert code == 0
    assert "No micro-batch fits a GPU of 0.50 GB" in text
    assert "deepspeed --hostfile" not in text


def test_gpus_without_bf16_get_fp16() -> None:
    made = make_plan(nar_xl_256(), Cluster(1, 8, "v100"))
    assert made.config is not None
    assert made.config["fp16"] == {"enabled": True}
    assert "bf16" not in made.config
    fp32 = make_plan(nar_xl_256(), Cluster(1, 8, "h100"), fp32=True)
    assert fp32.config is not None
    assert not {"fp16", "bf16"} & fp32.config.keys()


def test_classes_and_clips_have_plans() -> None:
    model = ModelConfig(grid=(4, 16, 16), positions="learned", condition="class", num_classes=101)
    recipe = replace(nar_xl_256(), model=model, frozen_text_encoder=None)
    assert isinstance(make_plan(recipe, POD), Plan)


def test_a_plan_takes_no_model_library() -> None:
    code = (
        "import sys; sys.argv = ['t2i', 'plan', 'nar-xl-256']\n"
        "from t2i.cli import main\n"
        "main()\n"
        "slow = {'torch', 'deepspeed', 'transformers', 'wandb'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
