"""What reading keeps in memory of a shard's index: where each sample's members lie, in as few bytes as hold it.

Shape suffixes: N samples of the shard, M distinct member suffixes, K bytes of all keys together.
"""

import numpy as np

from data_pipeline.shard_index import ShardIndex, narrow, pack_keys


class Places:
    """Keys and members of one shard's samples that belong to the set: its good ones without duplicates, in tar order."""

    def __init__(self, index: ShardIndex) -> None:
        self.suffixes = tuple(index.suffixes)
        keys_K, ends_N, offsets_NM, sizes_NM = index.keys_K, index.key_ends_N, index.offsets_NM, index.sizes_NM
        if index.duplicate_N.any():
            rows = np.flatnonzero(~index.duplicate_N)
            keys_K, ends_N = pack_keys([index.key(int(row)) for row in rows])
            offsets_NM, sizes_NM = offsets_NM[rows], sizes_NM[rows]
        self._keys = keys_K.tobytes()
        self._key_ends_N, self._offsets_NM, self._sizes_NM = narrow(ends_N), narrow(offsets_NM), narrow(sizes_NM)

    def __len__(self) -> int:
        return len(self._key_ends_N)

    def key(self, row: int) -> str:
        """The key of one sample, as it stands in the tar."""
        start = int(self._key_ends_N[row - 1]) if row else 0
        return self._keys[start : int(self._key_ends_N[row])].decode("utf-8", "surrogateescape")

    def members(self, row: int) -> list[tuple[str, int, int]]:
        """Suffix, offset in the tar and size (bytes) of each member that one sample has."""
        offsets, sizes = self._offsets_NM[row].tolist(), self._sizes_NM[row].tolist()
        return [place for place in zip(self.suffixes, offsets, sizes, strict=True) if place[1] >= 0]
