"""Which share of the work is this process's, under a launcher or alone.

    torchrun --nproc-per-node 8 -m t2i.cli geneval generate EXPORT --prompts FOLDER --out IMAGES

Ranks share work without talking to each other: what a rank does follows from its number alone, and what it has done is
a file that the others can see. So a rank may also be started later, or again.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

__all__ = ["Ranks", "launched"]


@dataclass(frozen=True)
class Ranks:
    """This process's number among those that share the work.

    Raises ValueError unless 0 <= rank < ranks.
    """

    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank is {self.rank} of {self.ranks} ranks; it must lie between 0 and {self.ranks - 1}")

    def owns(self, number: int) -> bool:
        """Whether the piece of work of that number, the same in every process, is this rank's: every n-th one is.

        Numbers of all the work, not of what is still missing: ranks look for that at different moments, and would count
        differently.
        """
        return number % self.ranks == self.rank

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """What RANK and WORLD_SIZE say, which torchrun and the DeepSpeed launcher set; without them, all the work.

        Raises ValueError where they are no such numbers.
        """
        found = {name: environment.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        for name, value in found.items():
            if not value.isdecimal():
                raise ValueError(f"{name} is {value!r} in the environment; unset it, or start with a launcher")
        rank, ranks = (int(value) for value in found.values())
        if rank >= ranks:
            raise ValueError(
                f"RANK is {rank} and WORLD_SIZE {ranks} in the environment; unset both, or start with a launcher"
            )
        return cls(rank, ranks)


def launched() -> Ranks:
    """This process's share of the work, as the environment says, once it has been given its share of the host's cores."""
    ranks = Ranks.from_environment()
    if ranks.ranks > 1:
        import torch

        from t2i.threads import cores_per_rank

        torch.set_num_threads(cores_per_rank())
    return ranks
