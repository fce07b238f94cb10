"""Small pictures and tars that the tests of this package are made of."""

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# Times of single examples say little on a busy machine.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

Members = Iterable[tuple[str, bytes]]


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """picture(size=32, number=0, kind="PNG") -> bytes of a picture of one colour that depends on the
    number.
    """

    def make(size: int = 32, number: int = 0, kind: str = "PNG") -> bytes:
        color = (number * 7 % 256, number * 31 % 256, number * 101 % 256)
        return encode(Image.fromarray(np.full((size, size, 3), color, np.uint8)), kind)

    return make


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """write_tar("raw/0.tar", [(name, data), …], format=tarfile.PAX_FORMAT) -> its path under tmp_path."""

    def write(name: str, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def raw_set(tmp_path: Path, write_tar: Callable[..., Path], picture: Callable[..., bytes]) -> Callable[..., Path]:
    """raw_set(shards, each, labels=False) -> root of a raw set, not indexed, with keys `000000`, `000001`,
    …
    """

    def make(shards: int, each: int, labels: bool = False) -> Path:
        for shard in range(shards):
            members = []
            for number in range(shard * each, (shard + 1) * each):
                members += [
                    (f"{number:06d}.png", picture(number=number)),
                    (f"{number:06d}.txt", b"a %d" % number),
                ]
                members += [(f"{number:06d}.cls", b"%d" % (number % 10))] if labels else []
            write_tar(f"raw/{shard:05d}.tar", members)
        return tmp_path / "raw"

    return make
