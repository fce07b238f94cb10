"""Judges by name: what decides their verdicts, and which options they take."""

import inspect
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from judged_folders import MakeJudge, shapes_judge

from eval.geneval.judges import load_judge
from eval.geneval.options import JudgeOptions


def test_a_file_of_weights_is_known_by_its_content(neural: MakeJudge, tmp_path: Path) -> None:
    made = []
    for name, content in (("a/one.pt", b"weights"), ("b/other.pt", b"weights"), ("c/one.pt", b"others")):
        file = tmp_path / name
        file.parent.mkdir()
        file.write_bytes(content)
        made.append(neural(clip="ViT-B-32", clip_pretrained=str(file)).made_from)
    assert made[0] == made[1] != made[2]
    other = neural(clip="ViT-L-14", clip_pretrained=str(tmp_path / "a/one.pt")).made_from
    assert other != made[0]
    gelu = neural(clip="ViT-B-32", clip_pretrained=str(tmp_path / "a/one.pt"), clip_quick_gelu=False).made_from
    assert gelu != made[0]


@pytest.mark.parametrize(
    "module",
    [
        "eval.geneval.judging",
        "eval.geneval.detections",
        "eval.geneval.scoring",
        "eval.geneval.prompts",
        "data_pipeline.images",
    ],
)
def test_other_code_on_the_way_of_a_picture_judges_anew(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = shapes_judge().made_from
    source = inspect.getsource

    def changed(of: ModuleType) -> str:
        return source(of) + "# changed\n" * (of.__name__ == module)

    monkeypatch.setattr("inspect.getsource", changed)
    after = shapes_judge().made_from
    assert after["code"] != before["code"]
    assert {**after, "code": None} == {**before, "code": None}


def test_other_libraries_judge_anew(neural: MakeJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    before, shapes_before = neural().made_from, shapes_judge().made_from
    monkeypatch.setattr(
        "eval.versions.version", lambda name: {"torch": "2.99.1+cpu", "pillow": "99.0"}.get(name, version(name))
    )
    after = neural().made_from
    assert after["libraries"] == {**before["libraries"], "torch": "2.99", "pillow": "99.0"}
    assert shapes_judge().made_from["libraries"] == {**shapes_before["libraries"], "pillow": "99.0"}
    assert "open-clip-torch" not in neural(needs_colors=False).made_from["libraries"]


def test_every_threshold_is_an_option(neural: MakeJudge) -> None:
    given = {
        "threshold": 0.11, "counting_threshold": 0.12, "max_objects": 13, "max_overlap": 0.14, "position_margin": 0.15,
        "position_share": 0.16,
    }  # fmt: skip
    assert neural(**given).detector.scoring.__dict__ == given
    judge = shapes_judge(**given)
    assert judge.detector.scoring.__dict__ == given
    assert shapes_judge().detector.scoring.threshold == 0.86


def test_without_colored_prompts_clip_is_not_needed(neural: MakeJudge) -> None:
    judge = neural(needs_colors=False, clip="local-dir:/nowhere")
    assert judge.colors is None
    with pytest.raises(ValueError, match="local-dir:/nowhere"):
        neural(clip="local-dir:/nowhere")


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="max_overlap is 0"):
        shapes_judge(max_overlap=0)
    with pytest.raises(ValueError, match="--detector-size is not for the judge 'shapes'"):
        shapes_judge(detector_size=(5, 5))
    with pytest.raises(ValueError, match="unknown judge 'owl'; choose one of mask2former, shapes"):
        load_judge("owl", JudgeOptions())
    options = JudgeOptions(detector="no/such", clip="local-dir:nowhere")
    with pytest.raises(ValueError, match=r"(?s)no/such.*; and .*nowhere lacks"):  # told in one go
        load_judge("mask2former", options)
    with pytest.raises(ValueError, match=r"no/such") as raised:
        load_judge("mask2former", options, needs_colors=False)
    assert "nowhere" not in str(raised.value)
