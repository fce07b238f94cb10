from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.images import open_frames
from t2i.animation import film_strips, save_clips

# Four clips of three frames: the red channel tells the clip, the green one the frame.
CLIPS = [[Image.new("RGB", (8, 6), (50 * clip, 80 * t, 0)) for t in range(3)] for clip in range(4)]


def test_film_strips_have_frames_from_left_to_right() -> None:
    strips = np.asarray(film_strips(CLIPS, columns=2))
    assert strips.shape == (2 * 6 + 8, 2 * (3 * 8 + 2 * 2) + 8, 3)
    for clip in range(4):
        for t in range(3):
            y, x = clip // 2 * (6 + 8), clip % 2 * (28 + 8) + t * (8 + 2)
            assert (strips[y : y + 6, x : x + 8] == (50 * clip, 80 * t, 0)).all()
    assert film_strips(CLIPS).size == (28, 4 * 6 + 3 * 8)


def test_an_animation_plays_all_clips_at_once(tmp_path: Path) -> None:
    save_clips(CLIPS, tmp_path / "new" / "clips.webp", columns=2, frame_ms=120)
    with Image.open(tmp_path / "new" / "clips.webp") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (3, (18, 14), 0)
        image.load()
        assert image.info["duration"] == 120
    frames = open_frames((tmp_path / "new" / "clips.webp").read_bytes())
    for t, frame in enumerate(frames):
        for clip in range(4):
            assert frame.getpixel((clip % 2 * 10, clip // 2 * 8)) == (50 * clip, 80 * t, 0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clips.webp"]


def test_the_name_decides_the_format(tmp_path: Path) -> None:
    for name, kind, count in (("a.GIF", "GIF", 3), ("a.webp", "WEBP", 3), ("a.png", "PNG", 1)):
        save_clips(CLIPS, tmp_path / name, columns=4, frame_ms=100)
        with Image.open(tmp_path / name) as image:
            assert (image.format, getattr(image, "n_frames", 1)) == (kind, count)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(film_strips(CLIPS, 4)))


def test_clips_of_different_lengths_are_nobodys_doing_but_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        save_clips([CLIPS[0], CLIPS[1][:2]], tmp_path / "a.webp", columns=2, frame_ms=100)
