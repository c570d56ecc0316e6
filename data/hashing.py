"""A stable 64-bit hash for ids, orders and bootstrap draws: the same on every machine, version and number of ranks."""

import hashlib

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def hash64(values: NDArray[np.integer], salt: int = 0) -> U64:
    """SplitMix64 finaliser (Steele et al., OOPSLA 2014) of 64-bit integers, salted; a new array."""
    x = values.astype(np.int64, copy=False).view(np.uint64) + np.uint64((salt + 1) * int(_GOLDEN) % 2**64)
    x ^= x >> np.uint64(30)
    x *= _MIX1
    x ^= x >> np.uint64(27)
    x *= _MIX2
    x ^= x >> np.uint64(31)
    return x


def salt_of(*parts: str | int) -> int:
    """A 63-bit salt from names and numbers."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def id_sum(ids: NDArray[np.integer]) -> int:
    """Order-free digest of a set of ids: the sum of their hashes modulo 2**64."""
    return int(hash64(ids).sum(dtype=np.uint64)) if len(ids) else 0
