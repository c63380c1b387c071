"""Random numbers that are a function of their place, not of what was drawn before.

A generator has a state, so what an image gets depends on the images before it, on the batch, on the number of
processes. Here each number is a hash of (seed, epoch, crop, index, slot): the same picture gets the same
draws whatever batch, process or device it is in, and a resumed run needs no random state at all.

The hash is splitmix64's finaliser, applied once for each word (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"; constants from https://prng.di.unimi.it/splitmix64.c).

Dimension key: B images · N images of an epoch · D draws
"""

import numpy as np
from numpy.typing import NDArray

_WORD = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: consecutive counters land far apart


def streams(*, seed: int, epoch: int, crop: int, indices_B: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One stream of random numbers for each image.

    Args:
        seed: Any integer; of those beyond 64 bits the low 64 count.
        epoch: Which pass over the data.
        crop: Which view of the image; purposes other than crops use negative numbers.
        indices_B: The images' places in the data set.

    Returns:
        uint64 [B]: what `uniforms` draws from.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in (seed, epoch, crop):
        state = _absorbed(state, np.array([word & _WORD], dtype=np.uint64))
    return _absorbed(state, indices_B.astype(np.int64).view(np.uint64))


def uniforms(streams_B: NDArray[np.uint64], *, slot: int, count: int = 1) -> NDArray[np.float64]:
    """Numbers in [0, 1) from slots `slot` to `slot + count - 1` of each stream.

    Args:
        streams_B: From `streams`.
        slot: What the number is for. A purpose keeps its slot, so a new one moves no other draw.
        count: How many consecutive slots.

    Returns:
        float64 [B, count], multiples of 2^-53.
    """
    slots_D = np.arange(slot, slot + count, dtype=np.uint64)
    bits_BD = _absorbed(streams_B[:, None], slots_D[None, :])
    return np.asarray((bits_BD >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def shuffled(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """An order of `range(count)` that depends on (seed, epoch) alone, whatever the numpy version."""
    keys_N = streams(seed=seed, epoch=epoch, crop=-1, indices_B=np.arange(count, dtype=np.int64))
    return np.argsort(keys_N, kind="stable").astype(np.int64)


def _absorbed(state: NDArray[np.uint64], words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's finaliser of the next counter with a word mixed in; arithmetic is modulo 2^64."""
    bits = (state + np.uint64(_GOLDEN_GAMMA)) ^ (words * np.uint64(_GOLDEN_GAMMA))
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ (bits >> np.uint64(31)), dtype=np.uint64)
