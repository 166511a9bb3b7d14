"""Compare the head on scored positions, and its cross entropy in pieces, with torch's own."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, GraniteConfig, LlamaConfig

from hecompile.graph.interpreter import as_tensor
from hecompile.runtime.client.mapped import release
from hecompile.runtime.model import head
from hecompile.runtime.model.head import LogitsForm, linear_cross_entropy, scored_positions, scored_targets

VOCABULARY, HIDDEN = 37, 16


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, HIDDEN, generator=generator, requires_grad=True)
    weight = 3 * torch.randn(VOCABULARY, HIDDEN, generator=generator)
    return hidden, weight, torch.randint(VOCABULARY, (rows,), generator=generator)


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 13])
def test_loss_and_gradient_are_those_of_torch_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(head, "PIECE_BYTES", 4 * VOCABULARY * 4)  # pieces of four rows
    monkeypatch.setattr(head, "WEIGHT_ROWS", 10)
    hidden, weight, targets = inputs(rows)
    (0.25 * linear_cross_entropy(hidden, weight, targets)).backward()
    reference = hidden.detach().clone().requires_grad_()
    loss = F.cross_entropy(reference @ weight.t(), targets, reduction="sum")
    (0.25 * loss).backward()
    assert hidden.grad is not None and reference.grad is not None
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), loss)
    torch.testing.assert_close(hidden.grad, reference.grad)


def test_one_row_is_a_piece_however_small_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PIECE_BYTES", 1)
    hidden, weight, targets = inputs(3)
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), expected)


def test_a_weight_of_16_bits_is_multiplied_as_the_float32_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "WEIGHT_ROWS", 10)
    hidden, weight, targets = inputs(5)
    narrow = weight.bfloat16()
    gradients = []
    for stored in (narrow, narrow.float()):
        hidden.grad = None
        loss = linear_cross_entropy(hidden, stored, targets)
        loss.backward()
        assert hidden.grad is not None
        gradients.append((loss.detach(), hidden.grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])


def test_products_in_bfloat16_are_near() -> None:
    hidden, weight, targets = inputs(64)
    exact = linear_cross_entropy(hidden, weight, targets)
    exact.backward()
    assert hidden.grad is not None
    expected, hidden.grad = hidden.grad, None
    loss = head.head_cross_entropy(hidden, head.LocalHead(weight, dtype=torch.bfloat16), targets)
    loss.backward()
    assert abs(float(loss - exact)) < 1e-3 * float(exact) and hidden.grad.dtype == torch.float32
    assert float(F.cosine_similarity(hidden.grad.flatten(), expected.flatten(), dim=0)) > 0.9999
    assert not torch.equal(hidden.grad, expected)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(4)
    loss = linear_cross_entropy(1000 * hidden, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(1000 * hidden @ weight.t(), targets, reduction="sum"))
    assert torch.isfinite(loss)


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, weight, targets = inputs(4)
    assert not linear_cross_entropy(hidden.detach(), weight, targets).requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_no_scored_position_gives_zero() -> None:
    hidden, weight, targets = inputs(4)
    assert linear_cross_entropy(hidden[:0], weight, targets[:0]).item() == 0.0


def test_positions_and_targets_belong_together() -> None:
    labels = torch.tensor([[-100, 7, -100, 9, -100], [5, 6, -100, -100, 8]])
    # The first label scores nothing: the first token is predicted from nothing.
    assert scored_positions(labels).nonzero().tolist() == [[0, 0], [0, 2], [1, 0], [1, 3]]
    assert scored_targets(labels).tolist() == [7, 9, 6, 8]


def test_a_mapped_weight_is_let_go_of_row_by_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(head, "WEIGHT_ROWS", 10)
    hidden, weight, targets = inputs(4)
    (tmp_path / "weight").write_bytes(weight.numpy().tobytes())
    with (tmp_path / "weight").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(mapping, dtype=np.float32).reshape(weight.shape)
    released: list[slice] = []

    def let_go(rows: slice) -> None:
        released.append(rows)
        release(array[rows])

    mapped = as_tensor(array)
    loss = linear_cross_entropy(hidden, mapped, targets, let_go)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, targets))
    assert {rows.start for rows in released} == {0, 10, 20, 30}
    assert torch.equal(mapped, weight)  # it comes back


def test_memory_that_no_file_holds_is_not_let_go_of() -> None:
    private = np.ones(3 * mmap.PAGESIZE, dtype=np.uint8)
    release(private)
    anonymous = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    anonymous[:] = bytes([7]) * len(anonymous)
    release(np.frombuffer(anonymous, dtype=np.uint8))
    assert private.all() and set(anonymous[:]) == {7}


@pytest.mark.parametrize("form", [LogitsForm(0.25), LogitsForm(0.5, 2.0)], ids=["scaled", "capped"])
def test_a_form_of_logits_is_in_loss_and_gradient(monkeypatch: pytest.MonkeyPatch, form: LogitsForm) -> None:
    monkeypatch.setattr(head, "PIECE_BYTES", 4 * VOCABULARY * 4)
    hidden, weight, targets = inputs(7)
    linear_cross_entropy(hidden, weight, targets, form=form).backward()
    reference = hidden.detach().clone().requires_grad_()
    product = reference @ weight.t()
    logits = product * 0.25 if form.cap is None else 2.0 * torch.tanh(product / 2.0)
    torch.testing.assert_close(form(product), logits)
    F.cross_entropy(logits, targets, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, reference.grad)


def test_the_form_of_logits_is_read_off_a_configuration() -> None:
    assert LogitsForm.of(LlamaConfig()) == LogitsForm()
    assert LogitsForm.of(GraniteConfig(logits_scaling=4.0)) == LogitsForm(0.25)
    assert LogitsForm.of(Gemma2Config(final_logit_softcapping=8.0)) == LogitsForm(0.125, 8.0)


def test_logits_are_differentiable_in_the_hidden_states() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, hidden = torch.randn(7, 5, generator=generator), torch.randn(3, 5, generator=generator).requires_grad_()
    factors = torch.randn(3, 7, generator=generator)
    (head.logits_of(hidden, head.LocalHead(weight), LogitsForm(0.5, 3.0)) * factors).sum().backward()
    own, hidden.grad = hidden.grad, None
    (LogitsForm(0.5, 3.0)(hidden @ weight.t()) * factors).sum().backward()
    assert own is not None and hidden.grad is not None
    torch.testing.assert_close(own, hidden.grad)
