"""Weights of the judges: where they are on this machine, or what to fetch and where to put it."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

__all__ = ["hub_folder", "not_here", "snapshot"]


def not_here(what: str, reason: Exception, fetch: str, option: str) -> ValueError:
    """The error for weights that are neither on disk nor to be had: one line with what to fetch and where to put it."""
    first = f"{type(reason).__name__}: {reason}".strip().partition("\n")[0].rstrip(".")
    return ValueError(
        f"{what} is not on this machine and could not be fetched ({first}); where there is a network, run `{fetch}`, "
        f"bring DIR here, and give {option}"
    )


def hub_folder(
    source: str, what: str, option: str, small_files: Sequence[str], weight_files: Sequence[Sequence[str]]
) -> Path:
    """The folder that `source` names: itself, or a hub repository's files, which are downloaded unless cached.

    Args:
        source: A folder, or OWNER/NAME on the Hugging Face hub.
        what: What is in it, for messages.
        option: The option that takes such a folder, for messages.
        small_files: Patterns of what is always fetched.
        weight_files: Patterns of the weights; the first of them that the repository has anything of.

    Raises ValueError where there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) or os.path.lexists(folder):
        raise ValueError(f"{what} {source} is no folder and no name on the Hugging Face hub; give {option} FOLDER")
    try:
        return snapshot(source, small_files, weight_files)
    except Exception as error:  # hub, HTTP and file system errors have no common class
        raise not_here(f"{what} {source}", error, f"hf download {source} --local-dir DIR", f"{option} DIR") from error


def snapshot(repository: str, small_files: Sequence[str], weight_files: Sequence[Sequence[str]]) -> Path:
    """Files of a hub repository, arguments as of `hub_folder`: from the cache where they are there, without a word to the hub.

    Raises what the hub raises, and ValueError where the repository has no such weights.
    """
    for offline in (True, False):
        for patterns in weight_files:
            try:
                found = Path(
                    snapshot_download(repository, allow_patterns=[*small_files, *patterns], local_files_only=offline)
                )
            except LocalEntryNotFoundError:
                if not offline:
                    raise
                break
            if any(path for pattern in patterns for path in found.glob(pattern)):
                return found
    raise ValueError(f"{repository} has no {', '.join(pattern for patterns in weight_files for pattern in patterns)}")
