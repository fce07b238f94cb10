"""A folder of pictures as ingestion sees it: what is in it, and which file a name in a table means."""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from data_pipeline.folders import files_under
from data_pipeline.images import IMAGE_SUFFIXES

INGEST_CAUSES: Final = {
    "bad_row": "the row is no record",
    "missing_image": "no picture is named, or there is no such file",
    "outside_folder": "the named file lies outside the folder of pictures",
    "unsupported_image": f"the named file is not one of {', '.join(IMAGE_SUFFIXES)}",
    "unreadable_image": "the file may not be read",
    "missing_caption": "no caption field or .txt file",
    "empty_caption": "nothing but white space",
    "bad_caption": "not text, or not UTF-8",
    "bad_label": "not a whole number of at least 0",
}


class UnusableError(Exception):
    """Something that cannot become a sample; `cause` is a key of `INGEST_CAUSES`."""

    def __init__(self, cause: str, detail: str) -> None:
        assert cause in INGEST_CAUSES, cause
        super().__init__(detail)
        self.cause = cause


class PictureFolder:
    """The files under `root`, by path relative to it: `pictures` (sorted), and `others`.

    Links to folders are followed, each real folder once; folders that could not be read are among `others` (see
    `folders.files_under`). `leave_out` are files and folders that do not count, such as the table itself or the output.
    `found` collects the pictures that `find` has returned. Raises ValueError when `root` is no folder.
    """

    def __init__(self, root: Path, leave_out: Iterable[Path] = ()) -> None:
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder: give the one that holds the pictures")
        self.root = root
        self.found: set[str] = set()
        pictures: list[str] = []
        skipped = {path.resolve() for path in leave_out}
        files, unread = files_under(root, lambda folder: any(folder.resolve().is_relative_to(s) for s in skipped))
        self.others: set[str] = set(unread)
        for name in files:
            if _is_picture(name) and not name.rpartition("/")[2].startswith("."):
                pictures.append(name)
            elif (root / name).resolve() not in skipped:
                self.others.add(name)
        # File systems and tables disagree on how accented letters are composed, so names match in either
        # form.
        self._composed = {unicodedata.normalize("NFC", name): name for name in pictures}
        self.pictures = dict.fromkeys(sorted(pictures))

    def find(self, name: str) -> str:
        """The picture, as a key of `pictures`, that a table means by `name`: a path in the folder, or an
        absolute one.

        Raises UnusableError when there is no such picture, or it may not be used.
        """
        if not name.strip():
            raise UnusableError("missing_image", "no file is named")
        relative = os.path.relpath(name, self.root) if os.path.isabs(name) else os.path.normpath(name)
        if relative == ".." or relative.startswith("../"):
            raise UnusableError("outside_folder", f"{name!r} is not under {self.root}")
        found = relative if relative in self.pictures else self._composed.get(unicodedata.normalize("NFC", relative))
        if found is None:
            if relative in self.others or (_suffix(relative) and not _is_picture(relative)):
                raise UnusableError("unsupported_image", f"{name!r} is of no supported kind")
            raise UnusableError("missing_image", f"no file {name!r} under {self.root}")
        if not os.access(self.root / found, os.R_OK):
            raise UnusableError("unreadable_image", f"no permission to read {self.root / found}")
        self.found.add(found)
        return found

    @property
    def unlisted(self) -> int:
        """How many pictures `find` has never returned."""
        return len(self.pictures) - len(self.found)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _is_picture(name: str) -> bool:
    return _suffix(name) in IMAGE_SUFFIXES
