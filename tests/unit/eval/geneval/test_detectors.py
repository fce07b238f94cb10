"""Judges by name."""

import numpy as np
import pytest

from data_pipeline import shapes
from eval.geneval.detectors import ShapesJudge, load_detector


def test_the_shapes_judge_by_name() -> None:
    detector = load_detector("shapes")
    assert isinstance(detector, ShapesJudge)
    assert detector.scoring.threshold == detector.scoring.counting_threshold
    sample = shapes.training_sample(0, 0)
    first, nothing = detector.detect([sample.image, np.full((64, 64, 3), 140, dtype=np.uint8)])
    assert len(first) == len(sample.objects)
    assert nothing == []
    assert detector.detect([]) == []


def test_unknown_judges_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown judge 'owl'; choose one of shapes"):
        load_detector("owl")
