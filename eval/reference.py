"""What pictures are compared with by FID and KID: a folder of others, or an `.npz` that was made of one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from eval.distances import FeatureSet
from eval.embedding import Network, embed_pictures
from eval.files import file_sha256, files_sha256
from eval.inception import Inception, Resize
from eval.pictures import PictureSet, Unreadable, list_pictures

__all__ = ["ReferenceOptions", "counted", "crop_warning", "read_reference"]


@dataclass(frozen=True)
class ReferenceOptions:
    """What pictures are compared with, and how.

    Attributes:
        path: A folder of pictures, or an `.npz`; see `eval.distances`.
        inception: File of Inception's weights; from the cache or fetched when None.
        resize: How pictures are brought to Inception's size; see `eval.inception`.
        crop: Cut the largest central square out of the folder's pictures.
        kid: Compute KID too, which takes features.
        save: An `.npz` to write of the folder.
    """

    path: Path
    inception: Path | None = None
    resize: Resize = "clean"
    crop: bool = False
    kid: bool = True
    save: Path | None = None

    def __post_init__(self) -> None:
        if not (self.path.is_dir() or (self.path.is_file() and self.path.suffix == ".npz")):
            raise ValueError(f"reference {self.path} is neither a folder of pictures nor an .npz; give one of them")
        if not self.path.is_dir() and (self.crop or self.save is not None):
            raise ValueError(
                f"reference {self.path} is no folder; pictures of one are cropped and saved as .npz, nothing else"
            )
        if self.save is not None and self.save.suffix != ".npz":
            raise ValueError(f"the reference is saved to an .npz; give {self.save.with_suffix('.npz')}")


class _Square:
    """A network that sees the largest central square of each picture."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def prepare(self, image: Image.Image) -> Tensor:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return self._network.prepare(image.crop((left, top, left + side, top + side)))

    def embed(self, batch: Tensor) -> Tensor:
        return self._network.embed(batch)


def read_reference(
    inception: Inception, options: ReferenceOptions, batch_size: int = 64, progress: bool = True
) -> tuple[FeatureSet, dict[str, Any]]:
    """What to compare with, and what scores.json says of it; saved where that is asked for.

    Its SHA-256 is that of the `.npz`, or of the names and contents of the pictures that could be read.

    Raises ValueError where an `.npz` lacks what is needed or was made with something else, and where pictures are too few.
    """
    about: dict[str, Any] = {"path": str(options.path)}
    if not options.path.is_dir():
        compared = FeatureSet.load(options.path, inception.about)
        if options.kid and compared.features is None:
            raise ValueError(
                f"{options.path} holds mu and sigma only, and KID needs features; give a folder of pictures or an .npz saved "
                "of one, or leave KID out (--no-kid)"
            )
        return compared, {
            **about, "sha256": file_sha256(options.path), "pictures": compared.pictures, "made": dict(compared.notes),
        }  # fmt: skip
    pictures = list_pictures(options.path, captions=False)
    network = _Square(inception) if options.crop else inception
    found = embed_pictures(pictures, [network], batch_size, "measure reference", progress)
    read = [pictures.root / pictures.names[number] for number in found.numbers]
    checksum = files_sha256(pictures.root, read)
    notes = {"crop": options.crop, "unreadable": len(found.unreadable), "pictures_sha256": checksum}
    compared = FeatureSet.from_features(found.features[0], inception.about, notes)
    if options.save is not None:
        compared.save(options.save)
    return compared, {**about, "sha256": checksum, "crop": options.crop, **counted(pictures, found.unreadable)}


def crop_warning(compared: FeatureSet, options: ReferenceOptions) -> str | None:
    """What to know where an `.npz` is of pictures that were cropped in another way than is asked for; else nothing."""
    if compared.notes.get("crop", options.crop) == options.crop:
        return None
    return (
        f"{options.path} is of the largest central square of each picture (--crop-reference), and the pictures that are "
        "compared with it are not cropped"
    )


def counted(pictures: PictureSet, unreadable: Sequence[Unreadable]) -> dict[str, Any]:
    """What scores.json says of how many pictures were read, of which were not, and of what else is odd about them."""
    return {
        "pictures": len(pictures.names) - len(unreadable),
        "unreadable": [asdict(one) for one in unreadable],
        "warnings": list(pictures.remarks),
    }
