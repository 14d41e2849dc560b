"""Private random numbers: nothing in clkit draws from the global generators."""

from __future__ import annotations

import json

import numpy as np


def private_rng(*seeds: int) -> np.random.Generator:
    """Return a generator that is a function of ``seeds`` alone (each at least 0)."""
    # NumPy pads a seed with zeros, so that without its length (1,) and (1, 0) would be the same
    return np.random.default_rng((len(seeds), *seeds))


def rng_state(rng: np.random.Generator) -> str:
    """Return the generator's state as JSON, so that a checkpoint holds no pickled object."""
    return json.dumps(rng.bit_generator.state)


def set_rng_state(rng: np.random.Generator, state: str) -> None:
    """Set the generator to a state that :func:`rng_state` returned."""
    rng.bit_generator.state = json.loads(state)
