"""Pictures with their prompts, as people have them: which files, whose prompts, decoded ahead of their use.

    pictures = list_pictures(Path("images"))
    for found in read_ahead(pictures.paths, prepare): ...

A folder is one of three kinds: GenEval's published layout (`00000/metadata.jsonl`, `00000/samples/0000.png`), pictures with
a `.txt` caption beside each, or just pictures, whose prompts may stand in a file of their own, in the order of the names.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image

from data_pipeline.images import IMAGE_SUFFIXES, read_rgb
from data_pipeline.picture_folder import PictureFolder
from data_pipeline.tables import TABLE_SUFFIXES, BadRow, read_table
from eval.ahead import done_ahead
from eval.layout import GRID_FILE, METADATA_FILE, is_layout, prompt_folders, read_metadata, samples_of, some

__all__ = ["Found", "PictureSet", "Unreadable", "list_pictures", "read_ahead", "read_prompt_file"]

Prepared = TypeVar("Prepared")

PROMPT_FIELDS = ("prompt", "caption")


@dataclass(frozen=True)
class PictureSet:
    """Pictures to measure, in order.

    Attributes:
        root: The folder that the names are relative to.
        names: Of the files, with `/`.
        prompts: What was asked for; empty where nobody knows.
        prompt_of: For each picture the index of its prompt; empty without prompts.
        remarks: A line each about what else lies there, or is missing.
    """

    root: Path
    names: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    prompt_of: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.prompt_of) == (len(self.names) if self.prompts else 0)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.root / name for name in self.names]


@dataclass(frozen=True)
class Unreadable:
    """A picture that cannot be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found(Generic[Prepared]):
    """One picture as `read_ahead` gives it: its number, and what was made of it or why it cannot be read."""

    number: int
    value: Prepared | None
    problem: str = ""


def read_prompt_file(path: Path, field: str | None = None) -> list[str]:
    """The prompts in a file: lines of a .txt, or one field of a table (.csv, .tsv, .json, .jsonl, .parquet).

    `field` names the table's field; when None it is "prompt", or else "caption". Empty lines at the end do not count.

    Raises ValueError for a file of another kind, without such a field, or with an empty prompt, naming its line or row.
    """
    if path.suffix.lower() == ".txt" and path.is_file():
        if field is not None:
            raise ValueError(f"{path} has lines and no fields; leave the prompt field ({field!r}) out")
        try:
            lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error
        rows, what = list(enumerate(lines, start=1)), "line"
    elif path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        rows, what = list(enumerate(_column(path, field), start=1)), "row"
    else:
        raise ValueError(f"{path} is no file of prompts; give a .txt with one a line, or {', '.join(TABLE_SUFFIXES)}")
    for number, prompt in rows:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"{path} {what} {number} holds no prompt ({prompt!r}); write one there or delete the {what}"
            )
    if not rows:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return [prompt.strip() for _, prompt in rows]


def _column(path: Path, field: str | None) -> list[Any]:
    *others, last = PROMPT_FIELDS if field is None else (field,)
    for name in others:
        try:
            return [_cell(row, name) for row in read_table(path, [name])]
        except ValueError:  # if it is not for the missing field, it is raised again below
            continue
    return [_cell(row, last) for row in read_table(path, [last])]


def _cell(row: Any, name: str) -> Any:
    return None if isinstance(row, BadRow) else row.get(name)


def list_pictures(
    folder: Path,
    prompts: Sequence[str] | None = None,
    images_per_prompt: int | None = None,
    captions: bool = True,
) -> PictureSet:
    """The pictures of a folder, of any of the three kinds.

    Args:
        folder: JPEG, PNG and WebP files in it and in folders below count; of GenEval's layout those that
            `eval.layout` finds, by number, as `t2i geneval score` does: prompts without pictures are left out.
        prompts: Of a folder that does not say itself: prompt i belongs to the i-th `images_per_prompt` pictures in order of
            their names (as numbers, where all names are numbers).
        images_per_prompt: With `prompts` 1 when not given. Of GenEval's layout: the first so many of each at most, all
            when not given.
        captions: Whether prompts are wanted at all; `.txt` files and metadata are not read otherwise.

    Raises ValueError where there are no pictures, or fewer than there should be, and where only some have captions.
    """
    if images_per_prompt is not None and images_per_prompt < 1:
        raise ValueError(f"images per prompt is {images_per_prompt}; it must be at least 1")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that holds pictures")
    if is_layout(folder):
        if prompts is not None:
            raise ValueError(f"{folder} names the prompt of each picture in its metadata.jsonl; leave the prompts out")
        return _geneval_layout(folder, images_per_prompt, captions)
    found = PictureFolder(folder)
    names = tuple(found.pictures)
    if not names:
        raise ValueError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}); give a folder that does")
    if prompts is not None:
        return _in_order(folder, names, prompts, images_per_prompt or 1)
    if images_per_prompt is not None:
        raise ValueError(f"images per prompt is {images_per_prompt}, and {folder} has no prompts; give a file of them")
    texts = {name.rpartition(".")[0]: name for name in found.others if name.lower().endswith(".txt")}
    captioned = [name for name in names if _stem(name) in texts]
    if not captions or not captioned:
        return PictureSet(folder, names)
    if bare := [name for name in names if _stem(name) not in texts]:
        raise ValueError(
            f"{len(bare):,} of {len(names):,} pictures in {folder} have no .txt caption, such as {bare[0]}; write it, or "
            "give a file of prompts"
        )
    read = tuple(_caption(folder / texts[_stem(name)]) for name in names)
    return PictureSet(folder, names, read, tuple(range(len(names))))


def _geneval_layout(folder: Path, images_per_prompt: int | None, captions: bool) -> PictureSet:
    names: list[str] = []
    prompts: list[str] = []
    prompt_of: list[int] = []
    bare: list[str] = []
    ignored: list[str] = []
    everything: set[str] = set()
    for home in prompt_folders(folder):
        metadata, found = read_metadata(home) if captions else {}, samples_of(home)
        files = [path.relative_to(folder).as_posix() for path in found.files]
        ignored += [path.relative_to(folder).as_posix() for path in found.ignored]
        everything |= {*files, (home / GRID_FILE).relative_to(folder).as_posix()}
        if not files:
            bare.append(home.name)
            continue
        prompt = metadata.get("prompt")
        if captions and (not isinstance(prompt, str) or not prompt.strip()):
            raise ValueError(f"{home / METADATA_FILE} names no prompt; it must be a JSON object with one")
        chosen = files[:images_per_prompt]
        names += chosen
        prompt_of += [len(prompts)] * len(chosen)
        prompts.append(str(prompt))
    if not names:
        raise ValueError(f"none of the {len(bare):,} prompts in {folder} has a picture; generate some first")
    everything.update(ignored)
    ignored += [name for name in PictureFolder(folder).pictures if name not in everything]
    remarks = []
    if bare:
        remarks.append(f"{len(bare):,} prompts in {folder} have no pictures and are left out: {some(bare)}")
    counts = Counter(Counter(prompt_of).values())
    if captions and len(counts) > 1:
        by_pictures = ", ".join(f"{number:,} have {pictures:,}" for pictures, number in sorted(counts.items()))
        remarks.append(f"prompts in {folder} differ in pictures: {by_pictures}")
    if ignored:
        remarks.append(
            f"{len(ignored):,} files in {folder} are no numbered pictures of a prompt and are left out: {some(ignored)}"
        )
    if not captions:
        return PictureSet(folder, tuple(names), remarks=tuple(remarks))
    return PictureSet(folder, tuple(names), tuple(prompts), tuple(prompt_of), tuple(remarks))


def _in_order(folder: Path, names: tuple[str, ...], prompts: Sequence[str], images_per_prompt: int) -> PictureSet:
    wanted = len(prompts) * images_per_prompt
    if len(names) != wanted:
        raise ValueError(
            f"{folder} holds {len(names):,} pictures, and {len(prompts):,} prompts with {images_per_prompt} each make "
            f"{wanted:,}; give the prompts of exactly these pictures, or another number of images per prompt"
        )
    # 10.png comes after 9.png.
    if all(Path(name).stem.isdecimal() and Path(name).parent == Path() for name in names):
        names = tuple(sorted(names, key=lambda name: int(Path(name).stem)))
    return PictureSet(
        folder, names, tuple(prompts), tuple(index for index in range(len(prompts)) for _ in range(images_per_prompt))
    )


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _caption(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    if not text:
        raise ValueError(f"{path} is empty; write the caption there, or delete it and the picture")
    return text


def read_ahead(
    paths: Iterable[Path], prepare: Callable[[Image.Image], Prepared], ahead: int = 32
) -> Iterator[Found[Prepared]]:
    """Each picture in order, decoded to RGB and prepared in threads, at most `ahead` of them before they are asked for."""
    return done_ahead(lambda numbered: _read(*numbered, prepare), enumerate(paths), ahead)


def _read(number: int, path: Path, prepare: Callable[[Image.Image], Prepared]) -> Found[Prepared]:
    try:
        image = read_rgb(path)
    except ValueError as error:
        return Found(number, None, str(error))
    return Found(number, prepare(image))
