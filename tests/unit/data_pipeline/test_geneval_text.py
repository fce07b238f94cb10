"""The six caption templates."""

import pytest

from data_pipeline.geneval_text import TAGS, plural, prompt_for, with_article

BENCH, COW = {"class": "bench", "count": 1}, {"class": "cow", "count": 1}


@pytest.mark.parametrize(
    ("tag", "include", "prompt"),
    [
        ("single_object", [BENCH], "a photo of a bench"),
        ("single_object", [{"class": "apple", "count": 1}], "a photo of an apple"),
        ("two_object", [BENCH, COW], "a photo of a bench and a cow"),
        ("counting", [{"class": "bench", "count": 2}], "a photo of two benchs"),
        ("counting", [{"class": "bus", "count": 4}], "a photo of four buses"),
        ("counting", [{"class": "skis", "count": 3}], "a photo of three skises"),
        ("colors", [BENCH | {"color": "red"}], "a photo of a red bench"),
        ("colors", [BENCH | {"color": "orange"}], "a photo of an orange bench"),
        ("position", [COW, BENCH | {"position": ["left of", 0]}], "a photo of a bench left of a cow"),
        (
            "position",
            [
                {"class": "star", "count": 1, "color": "blue"},
                {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
            ],
            "a photo of a red circle left of a blue star",
        ),
        (
            "color_attr",
            [BENCH | {"color": "red"}, COW | {"color": "blue"}],
            "a photo of a red bench and a blue cow",
        ),
    ],
)
def test_templates(tag: str, include: list[dict[str, object]], prompt: str) -> None:
    assert prompt_for(tag, include) == prompt


def test_tasks_are_in_published_order() -> None:
    assert TAGS == ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def test_words() -> None:
    assert [with_article(w) for w in ("umbrella", "heart", "Orange")] == [
        "an umbrella",
        "a heart",
        "an Orange",
    ]
    assert [plural(w) for w in ("glass", "cross", "star")] == ["glasses", "crosses", "stars"]


@pytest.mark.parametrize(
    ("tag", "include", "message"),
    [
        ("shape", [BENCH], "unknown GenEval task 'shape'"),
        ("two_object", [BENCH], "1 include entries; it needs 2"),
        ("counting", [BENCH], "asks for 1 objects"),
        ("position", [BENCH, COW], "must be \\[relation, 0\\]"),
        ("single_object", [{"class": "", "count": 1}], "noun phrase is empty"),
    ],
)
def test_mistakes_are_named(tag: str, include: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_for(tag, include)
