"""Every file under a folder, links to other folders included: data often lies on several disks."""

import os
from collections.abc import Callable
from pathlib import Path


def files_under(root: Path, leave_out: Callable[[Path], bool] = lambda folder: False) -> tuple[list[str], list[str]]:
    """The files under `root`, as sorted paths relative to it, and the folders that were not read.

    A link to a folder is followed, and every real folder is read once, under its own name rather than a link's. Not
    read, and so in the second list: links to what is read already, or to a folder that `root` lies in, which would bring
    in everything beside it; and what there is no permission to list. `leave_out(folder)` says which folders do not count
    at all. Paths use `/`. Raises OSError when `root` itself cannot be listed.
    """
    files: list[str] = []
    unread: list[str] = []
    home = Path(os.path.realpath(root))
    seen: set[str] = set()

    def name(path: str) -> str:
        return Path(path).relative_to(root).as_posix()

    def note(error: OSError) -> None:
        if error.filename == str(root):
            raise error
        unread.append(name(error.filename))

    # Real folders first: a link among them may lead to one of the others.
    waiting = [str(root)]
    for top in waiting:
        real = os.path.realpath(top)
        if real in seen or (top != str(root) and home.is_relative_to(real)):
            unread.append(name(top))
            continue
        for folder, subfolders, names in os.walk(top, onerror=note):
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            paths = [os.path.join(folder, subfolder) for subfolder in sorted(subfolders)]
            counted = [path for path in paths if not leave_out(Path(path))]
            waiting += [path for path in counted if os.path.islink(path)]
            subfolders[:] = [os.path.basename(path) for path in counted if not os.path.islink(path)]
            files += [name(os.path.join(folder, file)) for file in names]
    return sorted(files), sorted(unread)
