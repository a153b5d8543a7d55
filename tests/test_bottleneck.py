"""y = residual + scaling * (act(x D^T + b_d) U^T + b_u) and its gradients, against float64."""

from __future__ import annotations

import itertools

import compare
import pytest
import reference
import torch
from cases import DTYPES, lay_out
from fastpeft.ops.bottleneck import bottleneck

ACTIVATIONS = tuple(reference.ACTIVATIONS)
# (M, K, D, layout): one token, none, odd everything, wider than 256, a model's size
SHAPES = (
    (0, 64, 16, "plain"),
    (1, 96, 8, "plain"),
    (3, 341, 7, "strided"),
    (17, 64, 1, "3d"),
    (64, 128, 64, "transposed"),
    (65, 100, 300, "plain"),
    (33, 576, 36, "3d"),
)


def draw(M, K, D, layout, dtype, device, biases=True):
    def normal(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(device, dtype)

    x, dy = lay_out(normal(M, K), layout), lay_out(normal(M, K), layout)
    down, up = normal(D, K, scale=K**-0.5), normal(K, D, scale=D**-0.5)
    return x, dy, down, normal(D) if biases else None, up, normal(K) if biases else None


def rows(t):
    return t.reshape(-1, t.shape[-1])


def run(x, dy, down, down_bias, up, up_bias, activation, scaling, residual):
    """Forward and gradients by fastpeft: dict like reference.bottleneck_grads, and y."""
    tensors = dict(dx=x, ddown=down, ddown_bias=down_bias, dup=up, dup_bias=up_bias)
    leaves = {k: None if t is None else t.detach().requires_grad_(True) for k, t in tensors.items()}
    if residual is not None:
        residual = residual.detach().requires_grad_(True)
    y = bottleneck(*leaves.values(), activation, scaling, residual)
    assert y.shape == x.shape and y.dtype == x.dtype
    wanted = {k: t for k, t in leaves.items() if t is not None}
    extra = [] if residual is None else [residual]
    grads = torch.autograd.grad(y, [*wanted.values(), *extra], dy)
    result = dict(zip(wanted, grads, strict=False), y=y.detach())
    if residual is not None:
        assert torch.equal(grads[-1], dy)  # y = residual + ...: its gradient is dy
    return result


def formulas(dtype, x, dy, *parts, residual):
    flat = rows(x)
    y = reference.bottleneck(dtype, flat, *parts, None if residual is None else rows(residual))
    return dict(reference.bottleneck_grads(dtype, rows(dy), flat, *parts), y=y)


def reordered(dtype, seed, x, dy, down, down_bias, up, up_bias, activation, scaling, residual):
    """The same with tokens, features and bottleneck permuted and put back: other orders of sums.
    Plain torch's error depends on the order, and one order's worst element is luck.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = (rows(x).shape[0], x.shape[-1], down.shape[0])
    m, k, d = (torch.randperm(n, generator=generator).to(x.device) for n in sizes)
    found = formulas(
        dtype,
        rows(x)[m][:, k],
        rows(dy)[m][:, k],
        down[d][:, k],
        None if down_bias is None else down_bias[d],
        up[k][:, d],
        None if up_bias is None else up_bias[k],
        activation,
        scaling,
        residual=None if residual is None else rows(residual)[m][:, k],
    )
    axes = dict(y=(m, k), dx=(m, k), ddown=(d, k), dup=(k, d), ddown_bias=(d,), dup_bias=(k,))
    for name, value in found.items():
        for axis, order in enumerate(axes[name]):
            value = value.index_select(axis, torch.argsort(order))
        found[name] = value
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(device, shape, activation, dtype):
    M, K, D, layout = shape
    number = SHAPES.index(shape) + ACTIVATIONS.index(activation)
    x, dy, down, down_bias, up, up_bias = draw(
        M, K, D, layout, DTYPES[dtype], device, biases=number % 3 != 0
    )
    residual = (x, None, lay_out(torch.randn_like(rows(x)), layout))[number % 3]
    parts = (down, down_bias, up, up_bias, activation, 4.0 if number % 2 else 1.0)
    got = run(x, dy, *parts, residual)
    exact = formulas(torch.float64, x, dy, *parts, residual=residual)
    plain = formulas(DTYPES[dtype], x, dy, *parts, residual=residual)
    others = [reordered(DTYPES[dtype], seed, x, dy, *parts, residual) for seed in range(3)]
    assert set(got) == set(exact)
    for name, value in got.items():
        value = rows(value) if name in ("y", "dx") else value
        yardstick = [plain[name], *(found[name] for found in others)]
        compare.assert_close(
            value, exact[name], yardstick, dtype=DTYPES[dtype], name=f"{activation} {name}"
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_run_is_bitwise_equal(device, activation):
    x, dy, *parts = draw(65, 100, 33, "plain", torch.bfloat16, device)
    first, second = (run(x, dy, *parts, activation, 2.0, x) for _ in range(2))
    for name in first:
        compare.assert_bitwise(first[name], second[name], f"{activation} {name}")


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "relu"])
def test_gradcheck_in_float64(activation):
    x, _, down, down_bias, up, up_bias = draw(4, 11, 5, "plain", torch.float64, "cpu")
    residual = torch.randn_like(x)
    leaves = [t.requires_grad_(True) for t in (x, down, down_bias, up, up_bias, residual)]

    def layer(x, down, down_bias, up, up_bias, residual):
        return bottleneck(x, down, down_bias, up, up_bias, activation, 1.5, residual)

    assert torch.autograd.gradcheck(layer, leaves)


def test_input_that_is_also_the_residual_gets_both_gradients(device):
    x, dy, *parts = draw(9, 64, 8, "plain", torch.float32, device)
    leaf = x.detach().requires_grad_(True)
    bottleneck(leaf, *parts, "gelu", 2.0, leaf).backward(dy)
    exact = reference.bottleneck_grads(torch.float64, dy, x, *parts, "gelu", 2.0)["dx"] + dy
    plain = reference.bottleneck_grads(torch.float32, dy, x, *parts, "gelu", 2.0)["dx"] + dy
    compare.assert_close(leaf.grad, exact, plain)


def test_only_what_asks_gets_a_gradient(device):
    tensors = draw(5, 64, 8, "plain", torch.float32, device)
    x, dy, down, down_bias, up, up_bias = tensors
    for wanted in itertools.product((False, True), repeat=5):
        leaves = [
            t.detach().clone().requires_grad_(want)
            for t, want in zip((x, down, down_bias, up, up_bias), wanted, strict=True)
        ]
        y = bottleneck(*leaves, "silu", 1.0)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
            assert [leaf.grad is not None for leaf in leaves] == list(wanted)


def test_backward_keeps_no_hidden_layer(device):
    """D is wider than K here: anything of size [M, D] would be the largest tensor kept."""
    M, K, D = 32, 16, 128
    x, _, *parts = draw(M, K, D, "plain", torch.float32, device)
    kept = []

    def note(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        bottleneck(x.requires_grad_(True), *parts, "gelu", 1.0)
    assert kept and (M, D) not in kept


def test_refuses_unknown_activation(device):
    x, _, *parts = draw(2, 8, 4, "plain", torch.float32, device)
    with pytest.raises(ValueError, match="softplus.*relu"):
        bottleneck(x, *parts, "softplus", 1.0)
