"""Whether all ranks see one run folder, can write to it, and how fast."""

import contextlib
import os
import shutil
import time
from pathlib import Path

from t2i.doctor.facts import Plan

_PIECE = 2**22
_PATIENCE = 5.0
"""Seconds within which a file of one host has to be seen on the others; network file systems look again after three."""


class RunFolder:
    """The probe's own folder inside the run folder, of which nothing is left afterwards.

    First `enter` on one rank, then `join` on all, `write`, `leave` on all, and `remove` on the first.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._run_dir = plan, plan.recipe.run_dir
        self.path = probe_folder(plan)
        self._made: list[Path] = []

    def enter(self) -> str | None:
        """Make the folder and leave a token in it; returns why that cannot be."""
        missing = [folder for folder in (self._run_dir, *self._run_dir.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True)
            self._made = missing
            (self.path / "token").write_text(self._plan.mark)
        except OSError as error:
            return f"{self._run_dir} cannot be written: {error}"
        return None

    def join(self, rank: int) -> str | None:
        """Read the token and write a file of one's own; returns why that cannot be."""
        limit = time.monotonic() + _PATIENCE
        while True:
            try:
                found = (self.path / "token").read_text()
                break
            except OSError:
                if time.monotonic() > limit:
                    return f"{self._run_dir} is not the folder that the first rank sees: no {self.path.name} in it"
                with contextlib.suppress(OSError):
                    os.listdir(self._run_dir)  # has some network file systems look again
                time.sleep(0.1)
        if found != self._plan.mark:
            return f"{self._run_dir} holds another probe's token"
        try:
            (self.path / f"rank-{rank}").write_text("")
        except OSError as error:
            return f"{self._run_dir} cannot be written: {error}"
        return None

    def write(self, rank: int) -> tuple[int, float]:
        """Write as many bytes as planned and wait until they are on disk; (bytes, seconds). Raises OSError."""
        piece, left = os.urandom(_PIECE), self._plan.write_bytes  # zeros might not be stored at all
        path = self.path / f"data-{rank}"
        begun = time.perf_counter()
        try:
            with open(path, "wb") as file:
                while left > 0:
                    left -= file.write(piece[: min(left, _PIECE)])
                file.flush()
                os.fsync(file.fileno())
            return self._plan.write_bytes, time.perf_counter() - begun
        finally:
            path.unlink(missing_ok=True)

    def space(self) -> tuple[int, int]:
        """Bytes that are free where the run folder is or will be, and bytes in the checkpoints that are there."""
        place = next((p for p in (self._run_dir, *self._run_dir.absolute().parents) if p.is_dir()), Path("/"))
        kept = sum(file.stat().st_size for file in (self._run_dir / "checkpoints").rglob("*") if file.is_file())
        return shutil.disk_usage(place).free, kept

    def leave(self, rank: int) -> None:
        """Remove this rank's file."""
        with contextlib.suppress(OSError):  # where nothing could be written, nothing is left
            (self.path / f"rank-{rank}").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove all that was made, the run folder included where there was none."""
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # another rank's network file system may still show a file in it
                break


def probe_folder(plan: Plan) -> Path:
    """The probe's folder."""
    return plan.recipe.run_dir / f".doctor-{plan.mark}"
