"""The error rule itself: it must let plain torch pass and catch what is wrong."""

from __future__ import annotations

import compare
import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def product(dtype):
    x, w = torch.randn(16, 256), torch.randn(40, 256)
    x, w = x.to(dtype), w.to(dtype)
    return x.double() @ w.double().t(), x @ w.t()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_torch_passes(dtype):
    exact, plain = product(dtype)
    assert compare.judge(plain, exact, plain).ok
    assert compare.judge(exact.to(dtype), exact, plain).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_element_is_named(dtype):
    exact, plain = product(dtype)
    wrong = exact.to(dtype)
    wrong[3, 5] += 8 * (plain.double() - exact).abs().max().to(dtype) + 4 * torch.finfo(dtype).eps
    wrong[3, 5] *= 1.5
    verdict = compare.judge(wrong, exact, plain, name="y")
    assert not verdict.ok
    assert "y[3, 5]" in str(verdict) and "1 of 640" in str(verdict)


def test_a_little_wrong_everywhere_is_caught():
    """Each element stays below the worst element's allowance; the mean does not."""
    exact, plain = product(torch.bfloat16)
    plain = plain.clone()
    plain[0, 0] = exact[0, 0] + 1.0  # one bad element of plain torch gives everyone room
    wrong = (exact + 0.9).to(torch.bfloat16)
    error = (wrong.double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max()
    assert not compare.judge(wrong, exact, plain).ok


def test_not_finite_and_wrong_shape_are_caught():
    exact, plain = product(torch.float32)
    wrong = plain.clone()
    wrong[2, 1] = float("nan")
    assert "[2, 1]" in str(compare.judge(wrong, exact, plain))
    assert not compare.judge(wrong, exact, plain).ok
    assert not compare.judge(plain[:, :39], exact, plain).ok
    assert not compare.judge(plain, exact, wrong).ok


def test_empty_is_right():
    empty = torch.empty(0, 5)
    assert compare.judge(empty, empty.double(), empty).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_step_is_the_distance_to_the_next_number(dtype):
    values = torch.tensor([1.0, 1.5, 2.0, 3.99, 0.1, 100.0, 2.0**-10], dtype=dtype)
    bits = values.view(torch.int32 if dtype == torch.float32 else torch.int16)
    following = (bits + 1).view(dtype).double()
    assert torch.equal(compare.rounding_step(values.double(), dtype), following - values.double())


def test_bitwise_sees_the_sign_of_zero():
    compare.assert_bitwise(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    with pytest.raises(AssertionError, match=r"out\[0\]"):
        compare.assert_bitwise(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
