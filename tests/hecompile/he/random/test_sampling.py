"""Distributions, the separation of public from secret randomness, and secrets that work once."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import threading

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM

from hecompile.errors import InputError, SecurityError
from hecompile.he.parameters import RingParameters, test_insecure_parameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random import sampling, table_comparison, table_lookup
from hecompile.he.random.gaussian import (
    _STRADDLES,
    gaussian_cdf,
    gaussian_from_uniform,
    gaussian_table,
    second_bytes,
    step_tables,
    tail_bytes,
    wants_second,
)
from hecompile.he.random.sampling import ERROR_BOUND, SIGMA, OneTimeSecret, PublicSeed, SecretRandom
from hecompile.he.scheme import keygen

SEED = PublicSeed(bytes(range(32)))


def two_bytes(top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The top byte of numbers below 2^16, and the second one where it is wanted, as `gaussian_from_uniform` wants them."""
    high = (top >> 8).astype(np.uint8)
    second = (top & 255).astype(np.uint8)[wants_second()[high]]
    return high, np.concatenate([second, np.zeros(64, np.uint8)])


def chi_square_limit(freedom: int) -> float:
    """Exceeded with probability at most e^-21.5 < 5e-10 (Laurent and Massart, Ann. Statist. 28, 2000, lemma 1)."""
    return freedom + 2 * math.sqrt(freedom * 21.5) + 2 * 21.5


def test_a_keystream_of_several_calls_is_the_cipher_s(monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(range(32))
    monkeypatch.setattr(sampling.os, "urandom", lambda count: key[:count])
    count = 3 * len(sampling._ZEROS) + 7
    wanted = Cipher(AES256(key), mode=GCM(bytes(12))).encryptor().update(bytes(2 * count))
    keystream = sampling._Keystream()
    assert keystream.take(count).tobytes() + keystream.take(count).tobytes() == wanted


def test_integers_of_more_bits_than_a_byte_has_are_not_drawn_as_zeros() -> None:
    assert set(SecretRandom().below_power_of_two(2, 400)) == {0, 1, 2, 3}
    with pytest.raises(SecurityError, match="of 0 to 8 bits"):
        SecretRandom().below_power_of_two(22, 4)


def test_ternary_is_uniform() -> None:
    count = 300_000
    observed = np.bincount(SecretRandom().ternary(count).astype(int) + 1, minlength=3)
    assert len(observed) == 3
    assert ((observed - count / 3) ** 2 / (count / 3)).sum() < chi_square_limit(2)


@pytest.mark.parametrize("count", [0, 1, 5, 1536])
def test_ternary_gives_as_many_as_asked(count: int) -> None:
    assert SecretRandom().ternary(count).shape == (count,)


def test_ternary_draws_again_after_rejections(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [b"\xff" * 40, b"\x24" * 64]  # all four samples rejected; then 0, 1, 2, 0

    monkeypatch.setattr(sampling.os, "urandom", lambda _: drawn.pop(0))
    assert SecretRandom().ternary(8).tolist() == [-1, 0, 1, -1, -1, 0, 1, -1]
    assert drawn == []


@pytest.mark.parametrize("at_once", [1, 1024], ids=["many", "few"])
def test_gaussian_has_its_distribution(at_once: int) -> None:
    count, edge = 1 << 20, 12
    samples = np.concatenate([SecretRandom().discrete_gaussian((1024 // at_once, 1024)) for _ in range(at_once)])
    assert samples.shape == (1024, 1024)
    assert samples.dtype == np.int8
    weight = {k: math.exp(-(k**2) / (2 * SIGMA**2)) for k in range(-60, 61)}
    total = sum(weight.values())
    expected = np.zeros(2 * edge + 1)
    for k, w in weight.items():
        expected[min(max(k, -edge), edge) + edge] += count * w / total  # the two outer bins hold the tails
    observed = np.bincount(np.clip(samples.ravel(), -edge, edge).astype(int) + edge, minlength=2 * edge + 1)
    assert ((observed - expected) ** 2 / expected).sum() < chi_square_limit(2 * edge)


def keystream_of(key: bytes, *sizes: int) -> list[np.ndarray]:
    encryptor = Cipher(AES256(key), mode=GCM(bytes(12))).encryptor()
    return [np.frombuffer(encryptor.update(bytes(size)), dtype=np.uint8) for size in sizes]


@pytest.mark.parametrize("count", [1025, 300_000, (1 << 20) + 5000])
def test_every_byte_of_many_errors_is_of_one_fresh_keystream(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Top, second and last bytes are the keystream's own, one after the other: none is left over from an earlier call."""
    key = bytes(range(32))
    pieces = [min(1 << 20, count - start) for start in range(0, count, 1 << 20)]
    sizes = [size for piece in pieces for size in (piece, second_bytes(piece), tail_bytes(piece))]
    drawn = iter(keystream_of(key, *sizes))
    wanted = []
    for _ in pieces:
        top, second, tail = next(drawn), next(drawn), next(drawn)
        wanted.append(gaussian_from_uniform(top, second, lambda size, tail=tail: tail[:size]))  # type: ignore[misc]
    SecretRandom().discrete_gaussian((count,))  # fills the buffers with other bytes
    monkeypatch.setattr(sampling.os, "urandom", lambda size: key[:size])
    assert np.array_equal(SecretRandom().discrete_gaussian((count,)), np.concatenate(wanted))


def test_more_undecided_samples_than_expected_draw_on(monkeypatch: pytest.MonkeyPatch) -> None:
    key, count = bytes(range(32)), 100_000
    monkeypatch.setattr(sampling, "tail_bytes", lambda _: 0)
    monkeypatch.setattr(sampling.os, "urandom", lambda size: key[:size])
    top, second, later = keystream_of(key, count, second_bytes(count), 6 * 1000)
    wanted = gaussian_from_uniform(top, second, lambda size: later[:size])
    assert np.array_equal(SecretRandom().discrete_gaussian((count,)), wanted)


def test_every_byte_of_few_errors_is_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    count, asked = 1024, []
    stream = np.random.default_rng(3).integers(0, 256, 20_000, dtype=np.uint8)
    for start in range(0, len(stream) - 4096, 64):  # until some sample is undecided, which is one in 2300
        left = [stream[start:].tobytes()]
        asked.clear()

        def draw(size: int, left: list[bytes] = left) -> bytes:
            asked.append(size)
            taken, left[0] = left[0][:size], left[0][size:]
            return taken

        monkeypatch.setattr(sampling.os, "urandom", draw)
        found = SecretRandom().discrete_gaussian((count,))
        top = stream[start : start + count]
        second, later = np.split(stream[start + count :], [second_bytes(count)])
        assert np.array_equal(found, gaussian_from_uniform(top, second, lambda size, later=later: later[:size]))  # type: ignore[misc]
        if len(asked) > 1:
            return
    pytest.fail("no sample was undecided")


def test_gaussian_inverts_the_cdf_at_every_step() -> None:
    steps = [int(step) for step in gaussian_cdf()]
    assert len(steps) == 2 * ERROR_BOUND
    assert all(low < high for low, high in itertools.pairwise(steps))
    uniform = [u for step in steps for u in (step - 1, step)] + [0, 2**64 - 1]
    # just below step k the sample is k - ERROR_BOUND, at the step it is one more
    wanted = [k - ERROR_BOUND for step in range(len(steps)) for k in (step, step + 1)] + [-ERROR_BOUND, ERROR_BOUND]
    top = np.array([u >> 48 for u in uniform], dtype=np.uint16)
    cells = gaussian_table(16)[top]
    # each step lies inside its cell, so a step's own cell must be refined
    assert (cells[:-2] == _STRADDLES).sum() >= len(steps)
    low = [(u & (2**48 - 1)).to_bytes(6, "little") for u, cell in zip(uniform, cells, strict=True) if cell == 127]
    assert gaussian_from_uniform(*two_bytes(top), lambda size: b"".join(low)).tolist() == wanted


def test_gaussian_symmetric_and_tail_is_negligible() -> None:
    steps = [int(step) for step in gaussian_cdf()]
    assert all(abs(low + high - 2**64) <= 1 for low, high in zip(steps, steps[::-1], strict=True))
    total = sum(math.exp(-(k**2) / (2 * SIGMA**2)) for k in range(-90, 91))
    tail = 2 * sum(math.exp(-(k**2) / (2 * SIGMA**2)) for k in range(ERROR_BOUND + 1, 90)) / total
    assert tail < 2.0**-64


def test_most_samples_need_two_bytes() -> None:
    assert (gaussian_table(16) == _STRADDLES).mean() < 1e-3

    def refuse(size: int) -> bytes:
        raise AssertionError("no refinement is needed in the middle of a cell")

    assert gaussian_from_uniform(*two_bytes(np.array([32768 + 100])), refuse).tolist() == [0]


def test_vectors_and_single_look_ups_agree_on_all_two_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    top = np.random.default_rng(1).permutation(1 << 16)
    tail = bytes(6 * int((gaussian_table(16) == _STRADDLES).sum()))  # the sample at the start of each open cell
    starts = top.astype(np.uint64) << np.uint64(48)
    wanted = np.searchsorted(gaussian_cdf(), starts, side="right") - ERROR_BOUND
    for vectors in (True, False):
        if vectors and not table_lookup.supported():
            continue
        monkeypatch.setattr(table_lookup, "supported", lambda answer=vectors: answer)
        for count in (1 << 16, 1000, 63):  # whole vectors and a remainder
            samples = gaussian_from_uniform(*two_bytes(top[:count]), lambda size: tail[:size])
            assert np.array_equal(samples, wanted[:count])


def test_a_second_byte_never_serves_two_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    wanting = int(np.flatnonzero(wants_second())[3])
    for vectors in (True, False):
        if vectors and not table_lookup.supported():
            continue
        monkeypatch.setattr(table_lookup, "supported", lambda answer=vectors: answer)
        for count in (200, 50):
            top = np.full(count, wanting, dtype=np.uint8)
            enough = np.full(count + 64, 7, dtype=np.uint8)
            assert len(gaussian_from_uniform(top, enough, bytes)) == count
            with pytest.raises(SecurityError, match="too few random bytes"):
                gaussian_from_uniform(top, enough[: count - 1], bytes)


@pytest.mark.parametrize("count", [1, 64, 1000, 1 << 18])
def test_second_bytes_are_enough_by_far(count: int) -> None:
    rate = float(wants_second().mean())
    assert rate < 0.08
    spread = math.sqrt(count * rate * (1 - rate))
    assert second_bytes(count) >= min(count, count * rate + 20 * spread) + 64


def test_few_samples_leave_the_vector_path() -> None:
    before, step = step_tables().astype(int)
    left_open = sum(256 if before[cell] == _STRADDLES else 1 for cell in range(256))
    assert left_open / 65536 < 1 / 60
    assert (step < 255).sum() > 10


def test_seed_round_trip_and_separate_streams() -> None:
    assert PublicSeed.from_hex(SEED.hex()) == SEED
    assert PublicSeed.draw() != PublicSeed.draw()
    words = [SEED.stream("A").uint32(0, 64), SEED.stream("B").uint32(0, 64), SEED.stream("A").uint32(1, 64)]
    words += [SEED.derive("A").stream("A").uint32(0, 64)]
    assert len({w.tobytes() for w in words}) == len(words)
    assert (SEED.stream("A").uint32(0, 64)[:7] == SEED.stream("A").uint32(0, 7)).all()


@pytest.mark.parametrize("text", ["", "00", "zz" * 32, "00" * 33])
def test_malformed_seed_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="public seed"):
        PublicSeed.from_hex(text)


@pytest.mark.parametrize("wrong", [SecretRandom(), bytes(32), SEED.stream("A"), 7])
def test_public_matrix_takes_a_public_seed_only(wrong: object) -> None:
    with pytest.raises(SecurityError, match="PublicSeed"):
        PublicMatrix(test_insecure_parameters(), wrong, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [SEED, SEED.stream("A"), np.random.default_rng(0), None])
def test_secret_takes_secret_randomness_only(wrong: object) -> None:
    with pytest.raises(SecurityError, match="SecretRandom"):
        OneTimeSecret(wrong, 2, 16)  # type: ignore[arg-type]


def test_secret_randomness_cannot_be_replaced_by_a_subclass() -> None:
    with pytest.raises(SecurityError, match="subclassed"):
        type("Predictable", (SecretRandom,), {})


def test_secret_is_handed_out_once() -> None:
    secret = keygen(RingParameters(256, 5))
    value = secret.spend()
    assert value.shape == (5, 256)
    assert set(np.unique(value)) == {-1, 0, 1}
    with pytest.raises(SecurityError, match="already used"):
        secret.spend()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps, lambda s: s.__reduce__()])
def test_secret_cannot_be_duplicated(duplicate: object) -> None:
    secret = keygen(test_insecure_parameters())
    with pytest.raises(SecurityError, match="copied"):
        duplicate(secret)  # type: ignore[operator]
    assert secret.spend().shape == (2, 16)


def test_secret_shows_nothing() -> None:
    secret = keygen(test_insecure_parameters())
    assert repr(secret) == str(secret) == "<OneTimeSecret>"
    assert not hasattr(secret, "__dict__")


def test_one_thread_only_gets_the_secret() -> None:
    secret, barrier, outcomes = keygen(test_insecure_parameters()), threading.Barrier(8), []

    def spend() -> None:
        barrier.wait()
        try:
            outcomes.append(secret.spend() is not None)
        except SecurityError:
            outcomes.append(False)

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]


def test_forked_process_cannot_use_the_parents_secret() -> None:
    secret = keygen(test_insecure_parameters())
    child = os.fork()
    if child == 0:
        try:
            secret.spend()
        except SecurityError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert secret.spend().shape == (2, 16)


def test_a_cipher_that_writes_too_little_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        def __init__(self, *_: object, **__: object) -> None: ...

        def encryptor(self) -> Short:
            return self

        def update_into(self, data: bytes, target: memoryview) -> int:
            return len(data) - 1

    monkeypatch.setattr(sampling, "Cipher", Short)
    with pytest.raises(SecurityError, match="random bytes"):
        SecretRandom().discrete_gaussian((4096,))


def test_comparisons_refuse_a_table_that_does_not_grow_by_ones() -> None:
    with pytest.raises(ValueError, match="grow by ones"):
        table_comparison.top_byte_samples([0] * 100 + [2] * 156, [False] * 256)
