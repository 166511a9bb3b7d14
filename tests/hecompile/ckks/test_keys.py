"""Parameters under 128 bits cannot be made; the secret key cannot leave; what is refused by whom."""

from __future__ import annotations

import copy
import math
import os
import pickle

import numpy as np
import pytest

from hecompile.ckks.keys import EvaluationKeys, SecretKey
from hecompile.ckks.parameters import (
    MAX_MODULUS_BITS,
    MAX_SCALE_BITS,
    MIN_SCALE_BITS,
    SIGMA,
    CkksLiteral,
    CkksParameters,
    select,
)
from hecompile.errors import HecompileError, InputError, SecurityError, WorkerError
from hecompile.he.security import MINIMUM_BITS, security_bits
from hecompile.polynomial.depth import CircuitCost
from tests.runtime.ckks.support import key, parameters


@pytest.mark.parametrize("ring_dim", [8192, 16384, 32768])
def test_one_level_too_many_is_under_128_bits(ring_dim: int) -> None:
    levels = (MAX_MODULUS_BITS[ring_dim] - 31) // 30 - 2
    assert CkksLiteral(ring_dim, levels).modulus_bits <= MAX_MODULUS_BITS[ring_dim]
    with pytest.raises(SecurityError, match="128 bits"):
        CkksLiteral(ring_dim, levels + 1).validate()
    with pytest.raises(SecurityError, match="128 bits"):
        CkksParameters(CkksLiteral(ring_dim, levels + 1))


@pytest.mark.parametrize(("ring_dim", "modulus"), [(4096, 109), (8192, 218), (16384, 437), (32768, 872)])
def test_what_the_standard_allows_and_the_table_does_not_is_refused(ring_dim: int, modulus: int) -> None:
    assert security_bits(ring_dim, MAX_MODULUS_BITS[ring_dim], SIGMA) >= MINIMUM_BITS
    found = [
        literal
        for bits in range(MIN_SCALE_BITS, MAX_SCALE_BITS + 1)
        for levels in range(1, 40)
        if MAX_MODULUS_BITS[ring_dim] < (literal := CkksLiteral(ring_dim, levels, bits)).modulus_bits <= modulus
    ]
    assert found
    for literal in found:
        with pytest.raises(SecurityError, match=r"128 bits of security \(MATZOV, classical\)"):
            literal.validate()


def test_every_set_that_is_selected_has_128_bits_by_the_table() -> None:
    for levels in range(1, 13):
        assert select(levels).security_bits >= MINIMUM_BITS


def test_the_smallest_ring_is_selected_and_too_deep_is_refused_with_the_numbers() -> None:
    assert select(4).ring_dim == 8192 and select(5).ring_dim == 16384 and select(12).ring_dim == 16384
    with pytest.raises(InputError, match=r"no parameter set at 128 bits .*has 76 levels.*423.*12 levels fit: refresh"):
        select(76)


def test_depth_counts_the_modulus_that_the_parameters_have() -> None:
    for literal in (CkksLiteral(8192, 4), CkksLiteral(16384, 7, 28)):
        bits = math.prod(literal.validate().moduli).bit_length()
        assert CircuitCost(literal.levels, 0, 0, 0).modulus_bits(literal.scale_bits) == literal.modulus_bits == bits


@pytest.mark.parametrize(
    "fields", [{}, {"ring_dim": 8192, "levels": 4}, {"ring_dim": 8192.0, "levels": 4, "scale_bits": 30}, 7]
)
def test_malformed_fields_are_refused(fields: object) -> None:
    with pytest.raises(InputError):
        CkksParameters.from_fields(fields)
    assert CkksParameters.from_fields(parameters().fields()).moduli == parameters().moduli


def test_the_secret_key_cannot_be_copied_sent_or_shown() -> None:
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(SecurityError):
            take(key())
    assert repr(key()) == "<SecretKey>"


def test_a_forked_process_cannot_use_it() -> None:
    own = key()
    child = os.fork()
    if child == 0:
        try:
            own.encrypt(np.zeros(1))
        except SecurityError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_encryptions_of_one_value_differ_and_open_to_it() -> None:
    words = key().encrypt(np.full((2, 3), 0.25))
    assert not np.array_equal(words[0], words[1])
    assert np.abs(key().decrypt(words, parameters().levels)[:, :3] - 0.25).max() < 1e-4


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e12])
def test_what_cannot_be_encrypted_is_refused_unseen(value: float) -> None:
    with pytest.raises(InputError) as caught:
        key().encrypt(np.array([[value]]))
    assert "1e+12" not in str(caught.value)


def test_more_sequences_than_slots_are_refused() -> None:
    with pytest.raises(InputError, match=r"4097 sequences are more than the 4096 slots"):
        key().encrypt(np.zeros((1, 4097)))


def test_words_that_are_no_ciphertexts_are_refused() -> None:
    good = key().encrypt(np.zeros(1))
    level = parameters().levels
    beyond = good.copy()
    beyond[0, 0, 0, 0] = parameters().moduli[0]
    nothing = good.copy()
    nothing[:, 1] = 0
    for words in (beyond, nothing, good[:, :1], good[..., :4096]):
        with pytest.raises(WorkerError):
            key().decrypt(words, level)


def test_keys_of_other_parameters_are_refused() -> None:
    other = SecretKey(CkksLiteral(8192, 3).validate())
    with pytest.raises(HecompileError, match="other parameters"):
        EvaluationKeys(parameters(), other.evaluation_keys().words)
    other.close()
