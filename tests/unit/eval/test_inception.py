"""How pictures reach Inception, where its weights come from, and its layers against torch-fidelity's own call."""

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from eval.inception import FILE, URL_INCEPTION_V3, Inception, find_inception, resize_picture


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("resize", ["clean", "tensorflow"])
def test_pictures_of_the_right_size_stay(resize: str) -> None:
    image = picture(299, 299)
    pixels = resize_picture(image, resize)  # type: ignore[arg-type]
    assert pixels.dtype == torch.float32
    np.testing.assert_array_equal(pixels.numpy().transpose(1, 2, 0), np.asarray(image))


def test_clean_does_not_alias_and_tensorflow_does() -> None:
    """Of columns that alternate, one takes means and the other every second column."""
    columns = np.zeros((598, 598, 3), dtype=np.uint8)
    columns[:, ::2] = 255
    image = Image.fromarray(columns)
    clean, tensorflow = resize_picture(image, "clean"), resize_picture(image, "tensorflow")
    assert clean.shape == tensorflow.shape == (3, 299, 299)
    assert (clean[:, 5:-5, 5:-5] - 127.5).abs().max() < 20
    assert (tensorflow == 255).all()


def test_clean_is_not_rounded_and_stays_in_range() -> None:
    pixels = resize_picture(picture(64, 100), "clean")
    assert ((pixels - pixels.round()).abs() > 0.1).float().mean() > 0.5
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_clean_is_what_clean_fid_does() -> None:
    """Values of clean-fid 0.1.35, build_resizer("clean"), for two of these pictures."""
    for (height, width), expected in CLEAN.items():
        pixels = resize_picture(picture(height, width, seed=height), "clean")
        found = [float(pixels[c, y, x]) for c, y, x in PLACES]
        assert found == pytest.approx(expected, abs=2e-3)


PLACES = ((0, 0, 0), (1, 17, 250), (2, 298, 298), (0, 150, 149), (1, 33, 7))
CLEAN = {
    (64, 100): [41.07, 98.985, 229.66, 194.032, 63.897],
    (512, 400): [70.423, 43.323, 60.281, 165.727, 112.177],
}


def test_pictures_are_scaled_to_what_the_layers_take() -> None:
    inception = Inception(nn.Identity(), "clean")
    batch = torch.tensor([0.0, 128.0, 255.0])
    torch.testing.assert_close(inception.embed(batch), torch.tensor([-1.0, 0.0, 127 / 128]))
    assert inception.about == {"resize": "clean", "inception_sha256": None}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a network of which no connection comes about."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{unused.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        yield tmp_path / "torch/hub/checkpoints"


def test_without_weights_one_line_says_what_to_fetch(offline: Path) -> None:
    with pytest.raises(ValueError, match="Inception of FID and KID is not on this machine and could not be") as caught:
        find_inception(None)
    message = str(caught.value)
    assert "\n" not in message
    assert URL_INCEPTION_V3 in message
    assert f"give --inception DIR/{FILE}" in message
    assert list(offline.iterdir()) == []


@pytest.mark.parametrize("name", [FILE, "pt_inception-2015-12-05-6726825d.pth"])
def test_weights_in_the_caches_of_both_libraries_are_found(offline: Path, name: str) -> None:
    offline.mkdir(parents=True)
    (offline / name).touch()
    assert find_inception(None) == offline / name


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--inception .*none.pth is no file"):
        find_inception(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    save_file({"fc.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("text.pth", "text.safetensors", "other.pth", "other.safetensors"):
        with pytest.raises(
            ValueError, match=rf"{name} holds no weights of FID's Inception \(.*; give weights-"
        ) as caught:
            Inception.open(tmp_path / name, "clean")
        assert "\n" not in str(caught.value)


class Trap:
    """What a pickle can do."""

    def __reduce__(self) -> object:
        return (Path("trapped").touch, ())


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Trap()}, "evil.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        Inception.open(Path("evil.pth"), "clean")
    assert not Path("trapped").exists()


@pytest.mark.slow
def test_the_layers_are_those_of_the_published_network(random_inception: Path) -> None:
    """torch-fidelity's own call, on 8-bit pictures of two sizes, resizes as "tensorflow" does."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    inception = Inception.open(random_inception, "tensorflow")
    own = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=random_inception)
    for height, width in ((299, 299), (64, 90)):
        image = picture(height, width)
        with torch.inference_mode():
            expected = own(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0]
            found = inception.embed(inception.prepare(image)[None])
        assert found.shape == (1, 2048)
        torch.testing.assert_close(found, expected)
        assert found.std() > 0
    assert len(inception.about["inception_sha256"]) == 64


def test_the_tensorflow_way_is_the_librarys() -> None:
    image = picture(40, 70)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(299, 299), align_corners=False)[0]
    torch.testing.assert_close(resize_picture(image, "tensorflow"), expected)
