"""Products equal SEAL's bit for bit; every operation computes what its name says, masked entries included."""

from __future__ import annotations

import numpy as np
import pytest

from hecompile.ckks.evaluator import CkksTensor, Evaluator
from hecompile.ckks.keys import EvaluationKeys
from hecompile.ckks.library import MemoryFile, fields_and_words, seal
from hecompile.errors import LegalityError
from tests.runtime.ckks.support import LEVELS, decrypted, encrypted, evaluator, key, parameters

BATCH = 5


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng([7, *shape]).uniform(-1, 1, (*shape, BATCH))


def close(tensor: CkksTensor, expected: np.ndarray, error: float = 2e-4) -> bool:
    found = decrypted(tensor, BATCH)
    return found.shape == expected.shape and bool(np.abs(found - expected).max() < error)


@pytest.mark.parametrize("products", [1, 3, 9])
def test_a_sum_of_products_relinearised_and_rescaled_equals_seals(products: int) -> None:
    api, own = seal(), key()
    context = own.parameters.context()
    secret = api.KeyGenerator(context)
    relinearisation = api.RelinKeys()
    secret.create_relin_keys(relinearisation)
    count = len(own.parameters.moduli)
    encryptor, encoder = api.Encryptor(context, secret.secret_key()), api.CKKSEncoder(context)
    native = api.Evaluator(context)
    scale, plain = own.parameters.scales[-1], api.Plaintext()
    with MemoryFile() as file:
        shape = (2, count, own.parameters.ring_dim)
        digits = [fields_and_words(one.data(), file, shape)[1] for one in relinearisation.key(2)]
        ours = Evaluator(EvaluationKeys(own.parameters, np.stack(digits)), threads=2)
        shape = (2, own.parameters.primes(LEVELS), own.parameters.ring_dim)
        ciphertexts, words = [], []
        for value in range(2 * products):
            encoder.encode([float(value % 3), -0.5, value / 7], scale, plain)
            ciphertexts.append(api.Ciphertext(context))
            encryptor.encrypt_symmetric(plain, ciphertexts[-1])
            words.append(fields_and_words(ciphertexts[-1], file, shape)[1])
        total = None
        for left, right in zip(ciphertexts[:products], ciphertexts[products:], strict=True):
            product = api.Ciphertext(context)
            native.multiply(left, right, product)
            if total is None:
                total = product
            else:
                native.add_inplace(total, product)
        native.relinearize_inplace(total, relinearisation)
        native.rescale_to_next_inplace(total)
        expected = fields_and_words(total, file, (2, shape[1] - 1, shape[2]))[1]
    tensor = CkksTensor(np.stack(words), np.arange(2 * products), LEVELS)
    left, right = np.arange(products)[None], products + np.arange(products)[None]
    found = ours.product_sums(tensor, tensor, left, right, (1,))
    ours.close()
    assert found.level == LEVELS - 1
    assert np.array_equal(found.words[0], expected)


def test_sums_products_and_constants() -> None:
    x, y = numbers(3, 4), numbers(4)
    a, b = encrypted(x), encrypted(y)
    ev = evaluator()
    assert close(ev.add(a, b), x + y)
    assert close(ev.add(a, b, -1), x - y)
    assert close(ev.multiply(a, b), x * y)
    constant = np.linspace(-2, 2, 4)
    assert close(ev.scale(a, constant), x * constant[:, None])
    assert close(ev.add_constant(a, constant), x + constant[:, None])
    assert close(ev.reduce_sum(a, (0,), True), x.sum(0, keepdims=True))
    weight = np.random.default_rng(1).normal(size=(6, 4))
    assert close(ev.linear(a, weight), np.einsum("of,tfb->tob", weight, x))
    assert close(ev.concat([a, ev.multiply(a, a)], 0), np.concatenate([x, x * x]))
    other = numbers(4, 2)
    assert close(ev.matmul(a, encrypted(other)), np.einsum("ikb,kjb->ijb", x, other))


def test_a_long_inner_product_is_exact_in_float64() -> None:
    """Longer than one exact piece of float64 sums."""
    x = np.full((1, 300, BATCH), 1.0)
    weight = np.where(np.arange(300) % 2, 1.0, -0.5)[None]
    assert close(evaluator().linear(encrypted(x), weight), np.full((1, 1, BATCH), weight.sum()), error=1e-2)


def test_operands_of_different_levels_meet_at_the_lower_one() -> None:
    x = numbers(2)
    a = encrypted(x)
    ev = evaluator()
    square = ev.multiply(a, a)
    assert close(ev.multiply(ev.multiply(square, square), a), x**5)
    assert close(ev.add(ev.multiply(square, a), a), x**3 + x)


def test_masked_entries_are_dropped_and_cost_no_level() -> None:
    x = numbers(3, 3)
    mask = np.tril(np.ones((3, 3)))
    a = encrypted(x)
    ev = evaluator()
    masked = ev.scale(a, mask)
    assert masked.level == LEVELS and close(masked, x * mask[..., None])
    assert close(ev.scale(a, -mask), -x * mask[..., None])
    assert close(ev.multiply(masked, masked), (x * mask[..., None]) ** 2)
    assert close(ev.reduce_sum(masked, (1,), False), (x * mask[..., None]).sum(1))
    with pytest.raises(LegalityError, match="made zero"):
        ev.add_constant(masked, np.ones(3))


def test_a_product_without_a_level_is_refused() -> None:
    tensor = encrypted(numbers(1))
    for _ in range(LEVELS):
        tensor = evaluator().multiply(tensor, tensor)
    with pytest.raises(LegalityError, match=f"the {LEVELS} levels are used up"):
        evaluator().multiply(tensor, tensor)


def test_scales_of_levels_are_exact() -> None:
    p = parameters()
    for level in range(1, p.levels + 1):
        assert p.scales[level - 1] == p.scales[level] ** 2 / p.moduli[p.primes(level) - 1]
