"""The error rule: at most twice plain torch's own error in the same dtype against float64, plus one
rounding step.

Two checks, both must hold:
  every element   |out - exact| <= 2 * max|plain - exact| + step(exact)
  all together    rms(out - exact) <= 2 * rms(plain - exact) + rms(step(exact))
step(v) is the distance between neighbouring numbers of the dtype at v. The second check is the
sharp one: a kernel that is a little wrong everywhere hides below the worst element's allowance, not
below the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Verdict:
    """What judge() found; str() is the report."""

    ok: bool
    text: str
    excess: float = float("inf")  # how many times over what is allowed; at most 1 when ok

    def __str__(self) -> str:
        return self.text


def rounding_step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbouring numbers of `dtype` at each of `values` (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny))[1] - 1  # floor(log2), exact
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _listed(plain) -> list[torch.Tensor]:
    return plain if isinstance(plain, list) else [plain]


def judge(out, exact, plain, *, dtype=None, name="out") -> Verdict:
    """Compares out with the float64 `exact`, with `plain` (plain torch in the same dtype) as the
    yardstick: a tensor, or a list of the same result from several orders of summation, of which the
    worst error counts.

    dtype: where the computation was done when out's own dtype is wider (a float32 gradient of a
    bfloat16 layer).
    """
    dtype = dtype or out.dtype
    if tuple(out.shape) != tuple(exact.shape):
        return Verdict(False, f"{name}: shape {tuple(out.shape)}, expected {tuple(exact.shape)}")
    if out.numel() == 0:
        return Verdict(True, f"{name}: empty", 0.0)
    out64, exact = out.detach().double(), exact.detach()
    plain64 = torch.stack([p.detach().double() for p in _listed(plain)])
    if not bool(torch.isfinite(plain64).all()):
        return Verdict(
            False, f"{name}: the case itself is wrong: plain torch is not finite in {dtype}"
        )
    if not bool(torch.isfinite(out64).all()):
        where = tuple(torch.nonzero(~torch.isfinite(out64))[0].tolist())
        return Verdict(
            False, f"{name}{list(where)}: {float(out64[where])}, expected {float(exact[where])}"
        )
    error, plain_error = (out64 - exact).abs(), (plain64 - exact).abs()
    step = rounding_step(exact, dtype)
    allowed = 2 * plain_error.max() + step
    worst = int((error - allowed).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), out.shape))
    rms, rms_allowed = _rms(error), 2 * max(map(_rms, plain_error)) + _rms(step)
    ok = bool(error[where] <= allowed[where]) and rms <= rms_allowed
    over = int((error > allowed).sum())
    text = (
        f"{name}{list(where)}: got {float(out64[where]):.9g}, exact {float(exact[where]):.9g}, "
        f"plain torch {float(plain64[(0, *where)]):.9g}; error {float(error[where]):.3g}, "
        f"allowed {float(allowed[where]):.3g} (2 x {float(plain_error.max()):.3g} + one step); "
        f"rms error {rms:.3g}, allowed {rms_allowed:.3g}; {over} of {out.numel()} elements over"
    )
    excess = max(float(error[where] / allowed[where]), rms / rms_allowed)
    return Verdict(ok, text, excess)


def assert_close(out, exact, plain, *, dtype=None, name="out") -> None:
    """Raises AssertionError with the worst element when the error rule does not hold."""
    verdict = judge(out, exact, plain, dtype=dtype, name=name)
    assert verdict.ok, verdict.text


def assert_bitwise(first: torch.Tensor, second: torch.Tensor, name="out") -> None:
    """Raises AssertionError naming the first element whose bits differ."""
    assert first.shape == second.shape and first.dtype == second.dtype, (
        f"{name}: {tuple(first.shape)} {first.dtype} against {tuple(second.shape)} {second.dtype}"
    )
    if first.numel() == 0:
        return
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    differ = first.contiguous().view(width) != second.contiguous().view(width)
    if bool(differ.any()):
        where = tuple(torch.nonzero(differ)[0].tolist())
        raise AssertionError(
            f"{name}{list(where)}: {first[where].item()!r} against {second[where].item()!r}; "
            f"{int(differ.sum())} of {first.numel()} elements differ"
        )
