"""Random numbers: uniform, independent in every argument, and the same for ever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gmel.physics.random import Bits, hash_bits, mix_seed, normal, seed_words, uniform
from gmel.simulator.environment import seeds

COUNT = 1 << 16
MASK = 0xFFFFFFFF
# Every statistic below is a z-score or a p-value of fixed numbers: the bounds fail a good generator once in 10^5.
Z_LIMIT, P_LIMIT = 4.5, 1e-5


def words(seed: int = 7, slot: int = 3, what: int = 9, index: np.ndarray | None = None) -> np.ndarray:
    """Hash words [4, n]."""
    index = np.arange(COUNT) if index is None else index
    return np.stack(_hash(jnp.asarray(seed_words(seed)), jnp.int32(slot), what, jnp.asarray(index)))


_hash = jax.jit(hash_bits, static_argnums=2)


def pcg4d(x: int, y: int, z: int, w: int) -> tuple[int, ...]:
    """Jarzynski and Olano 2020, listing 11, on Python integers."""
    v = [(u * 1664525 + 1013904223) & MASK for u in (x, y, z, w)]

    def mix() -> None:
        v[0] = (v[0] + v[1] * v[3]) & MASK
        v[1] = (v[1] + v[2] * v[0]) & MASK
        v[2] = (v[2] + v[0] * v[1]) & MASK
        v[3] = (v[3] + v[1] * v[2]) & MASK

    mix()
    v[:] = [u ^ (u >> 16) for u in v]
    mix()
    return tuple(v)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1), st.sampled_from([0, 1, 9, 255]), st.integers(0, 2**24 - 1))
def test_hash_is_pcg4d_of_index_and_purpose_slot_and_seed(seed: int, slot: int, what: int, index: int) -> None:
    expected = pcg4d(index + (what << 24), slot, seed & MASK, seed >> 32)
    assert tuple(int(word) for word in words(seed, slot, what, np.array(index))) == expected


def test_stream_never_changes() -> None:
    golden = [
        [251852841, 760645481, 850445371, 3542436074],
        [188542915, 2736636373, 1610343845, 1648167326],
        [4163825529, 1709951646, 2816725711, 2033435003],
    ]
    assert words(0, 0, 0, np.array([0, 1])).T.tolist() == golden[:2]
    assert words(2**64 - 1, 12345, 255, np.array([2**24 - 1])).T.tolist() == golden[2:]


@pytest.mark.parametrize("word", range(4))
def test_words_are_uniform(word: int) -> None:
    u = np.asarray(uniform(jnp.asarray(words()[word])), float)
    assert stats.kstest(u, "uniform").pvalue > P_LIMIT
    for shift in (24, 16, 8, 0):
        counts = np.bincount((words()[word] >> shift) & 0xFF, minlength=256)
        assert stats.chisquare(counts).pvalue > P_LIMIT


@given(st.integers(0, 2**64 - 1), st.integers(0, 63))
def test_every_bit_of_a_seed_matters_everywhere(seed: int, bit: int) -> None:
    one, other = (mix_seed(jnp.asarray(seed_words(each))) for each in (seed, seed ^ (1 << bit)))
    changed = [int(word).bit_count() for word in np.asarray(one ^ other)]
    assert min(changed) >= 4  # of 32 bits, 16 on average; below 4 once in 10^5


def z_of_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1] * np.sqrt(a.size))


def pairs_p_value(a: np.ndarray, b: np.ndarray) -> float:
    counts = np.bincount(((a >> 28) * 16 + (b >> 28)).astype(np.int64), minlength=256)
    return float(stats.chisquare(counts).pvalue)


NEIGHBOURS = {
    "index": {"index": np.arange(COUNT) + 1},
    "index-256-apart": {"index": np.arange(COUNT) + 256},
    "slot": {"slot": 4},
    "seed": {"seed": 8},
    "seed-high-word": {"seed": 7 + 2**32},
    "seed-highest-bit-of-low-word": {"seed": 7 + 2**31},
    "seed-highest-bit": {"seed": 7 + 2**63},
    "purpose": {"what": 10},
    "purpose-2-apart": {"what": 11},
    "purpose-8-apart": {"what": 1},
}


def stream(seed: int = 7, slot: int = 3, what: int = 9, index: np.ndarray | None = None) -> np.ndarray:
    """Words as an environment draws them, with its seed mixed."""
    index = np.arange(COUNT) if index is None else index
    return np.stack(_hash(mix_seed(jnp.asarray(seed_words(seed))), jnp.int32(slot), what, jnp.asarray(index)))


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_neighbours_are_independent(neighbour: str) -> None:
    here, there = stream(), stream(**NEIGHBOURS[neighbour])
    for a in here:
        for b in there:
            assert abs(z_of_correlation(a.astype(float), b.astype(float))) < Z_LIMIT
            assert pairs_p_value(a, b) > P_LIMIT


def test_words_of_a_hash_are_independent() -> None:
    here = words()
    for first in range(4):
        for second in range(first):
            assert abs(z_of_correlation(here[first].astype(float), here[second].astype(float))) < Z_LIMIT
            assert pairs_p_value(here[first], here[second]) > P_LIMIT


def test_slots_of_one_row_are_uniform_and_uncorrelated() -> None:
    """The series that a single row of the request table sees."""
    seed = jnp.asarray(seed_words(7))
    series = jax.jit(jax.vmap(lambda slot: jnp.stack(hash_bits(seed, slot, 9, jnp.int32(0)))))
    for word in np.asarray(series(jnp.arange(COUNT))).T:
        assert stats.kstest(word / 2.0**32, "uniform").pvalue > P_LIMIT
        for lag in (1, 2, 10):
            assert abs(z_of_correlation(word[lag:].astype(float), word[:-lag].astype(float))) < Z_LIMIT


def test_bits_are_balanced() -> None:
    bits = np.unpackbits(words().astype(">u4").view(np.uint8).reshape(4, COUNT, 4), axis=2)
    z = (bits.mean(axis=1) - 0.5) * 2 * np.sqrt(COUNT)
    assert np.abs(z).max() < Z_LIMIT


# PCG4D carries a change in the highest bits of an input to the highest bits of its words only: for those input bits the
# leading output bits alone are tested. All 23 that `uniform` uses must follow indices, slots and small seeds.
INPUT_BITS = {"index": 24, "purpose": 4, "slot": 30, "seed-low": 30, "seed-high": 30}
FULL_BITS = {"index": 24, "purpose": 1, "slot": 24, "seed-low": 24, "seed-high": 22}


@pytest.mark.parametrize("flip", INPUT_BITS)
def test_one_input_bit_changes_each_output_bit_half_of_the_time(flip: str) -> None:
    count = 4096
    index = np.arange(count)
    before = words(index=index)
    for bit in range(INPUT_BITS[flip]):
        change = {
            "index": {"index": index ^ (1 << bit)},
            "purpose": {"what": 9 ^ (1 << bit), "index": index},
            "slot": {"slot": 3 ^ (1 << bit), "index": index},
            "seed-low": {"seed": 7 ^ (1 << bit), "index": index},
            "seed-high": {"seed": 7 ^ (1 << (32 + bit)), "index": index},
        }[flip]
        leading = 23 if bit < FULL_BITS[flip] else 11
        changed = (before ^ words(**change)) >> (32 - leading)
        share = np.stack([((changed >> position) & 1).mean(axis=1) for position in range(leading)])
        assert np.abs(share - 0.5).max() * 2 * np.sqrt(count) < 6.0, (flip, bit)


def test_normal_has_its_moments_and_law() -> None:
    x, y, z, w = (jnp.asarray(word) for word in words())
    first, second = np.asarray(normal(x, y), float), np.asarray(normal(z, w), float)
    for sample in (first, second):
        assert stats.kstest(sample, "norm").pvalue > P_LIMIT
        assert abs(sample.mean()) * np.sqrt(COUNT) < Z_LIMIT
        assert abs(sample.var() - 1) * np.sqrt(COUNT / 2) < Z_LIMIT
        assert abs(stats.skew(sample)) * np.sqrt(COUNT / 6) < Z_LIMIT
        assert abs(stats.kurtosis(sample)) * np.sqrt(COUNT / 24) < Z_LIMIT
    assert abs(z_of_correlation(first, second)) < Z_LIMIT
    assert abs(z_of_correlation(first[1:], first[:-1])) < Z_LIMIT


EXTREMES = np.array([0, 1, 511, 512, 2**31, MASK - 512, MASK - 1, MASK], np.uint32)


def test_uniform_is_never_zero_or_one() -> None:
    for double in (False, True):
        with jax.enable_x64(double):
            u = np.asarray(uniform(jnp.asarray(EXTREMES)))
            assert u.dtype == (np.float64 if double else np.float32)
            assert u.min() == 2.0**-24
            assert u.max() == 1 - 2.0**-24
            assert np.isfinite(np.asarray(normal(jnp.asarray(EXTREMES), jnp.asarray(EXTREMES[::-1])))).all()


def test_single_and_double_precision_see_the_same_number() -> None:
    single = np.asarray(uniform(jnp.asarray(words()[0])))
    with jax.enable_x64(True):
        double = np.asarray(uniform(jnp.asarray(words()[0])))
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    np.testing.assert_array_equal(single.astype(np.float64), double)


@pytest.mark.parametrize("seed", [-1, 2**64, 2**70])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed = -?\d+ must be in \[0, 2\*\*64\)"):
        seed_words(seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_seed_words_hold_the_whole_seed(seed: int) -> None:
    low, high = (int(word) for word in seed_words(seed))
    assert low + (high << 32) == seed


def test_seeds_of_parallel_environments_are_consecutive() -> None:
    first = 2**32 - 2
    assert np.asarray(seeds(first, 4)).tolist() == [seed_words(first + n).tolist() for n in range(4)]


def test_shape_follows_the_index() -> None:
    bits = hash_bits(jnp.asarray(seed_words(1)), jnp.int32(0), 1, jnp.arange(6).reshape(2, 3))
    assert isinstance(bits, Bits)
    assert all(word.shape == (2, 3) and word.dtype == jnp.uint32 for word in bits)
