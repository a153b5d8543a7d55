"""What the operators and the build refuse: refusals 16, 17 and 19 of the interop guide.

Damaged quantised data (7, 8) is in test_quant, quantising twice or on meta (20) in test_convert,
test_quant and test_modules.
"""

from __future__ import annotations

import copy

import fastpeft
import pytest
import torch
from fastpeft.cli import diagnosis
from fastpeft.errors import ConfigError, FormatError, StateError
from fastpeft.functional import bottleneck, qlinear
from torch import nn

M, N, K, R, D = 3, 48, 64, 4, 8


def packed(device: str = "cpu"):
    return fastpeft.quantize_tensor(torch.randn(N, K, device=device), "nf4")


def factors(dtype=torch.float32, device="cpu"):
    return torch.randn(R, K, dtype=dtype, device=device), torch.randn(N, R, device=device)


# ---- 16 devices, dtypes, sizes


def test_16_a_weight_on_meta_is_no_weight():
    """The fake would answer with memory that nobody wrote."""
    x, q, A = torch.randn(M, K), packed(), torch.randn(R, K)
    away = {"device": "meta"}
    for words, call in (
        ("codes: got a tensor on meta, expected cpu like x", lambda: qlinear(x, q.to("meta"))),
        (
            "codes: got a tensor on cpu, expected meta like x",
            lambda: qlinear(torch.empty(M, K, **away), q),
        ),
        ("bias: got a tensor on meta", lambda: qlinear(x, q, torch.empty(N, **away))),
        (
            "lora_A: got a tensor on meta",
            lambda: qlinear(x, q, None, torch.empty(R, K, **away), torch.empty(N, R, **away)),
        ),
        ("lora_B: got a tensor on meta", lambda: qlinear(x, q, None, A, torch.empty(N, R, **away))),
        (
            "up: got a tensor on meta",
            lambda: bottleneck(x, torch.randn(D, K), None, torch.empty(K, D, **away), None, "relu"),
        ),
    ):
        with pytest.raises(ConfigError, match=f"^{words}.*move all tensors to one device"):
            call()


def test_16_gradients_with_a_part_on_meta_are_refused():
    x = torch.randn(M, K)
    layer = fastpeft.LoRALinear.from_linear(nn.Linear(K, N), r=R)
    layer.lora_B.weight = nn.Parameter(torch.empty(N, R, device="meta"))
    with pytest.raises(ConfigError, match="lora_B: got a tensor on meta"):
        layer(x)
    quantised = fastpeft.Linear4bit(K, N, device="meta")
    with pytest.raises(ConfigError, match="codes: got a tensor on meta.*Load the weights"):
        quantised(x)


def test_16_two_devices(cuda):
    x, q, (A, B) = torch.randn(M, K, device=cuda), packed(cuda), factors(device=cuda)
    for words, call in (
        (
            "codes is on cpu but x is on cuda:0: put both on one device",
            lambda: qlinear(x, q.to("cpu")),
        ),
        ("lora_A is on cpu but x is on cuda", lambda: qlinear(x, q, None, A.cpu(), B)),
        ("bias is on cpu but x is on cuda", lambda: qlinear(x, q, torch.randn(N))),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_16_input_that_is_not_floating(dtype):
    with pytest.raises(
        RuntimeError, match="x: expected torch.float32, torch.bfloat16, torch.float16"
    ):
        qlinear(torch.ones(M, K).to(dtype), packed())


@pytest.mark.parametrize("shape", [(M, K + 1), (K, M), (0,), ()])
def test_16_wrong_last_dimension(shape):
    for call in (
        lambda x: qlinear(x, packed()),
        fastpeft.Linear4bit.from_linear(nn.Linear(K, N)),
        fastpeft.QLoRALinear(K, N, r=R),
    ):
        with pytest.raises(ConfigError, match=rf"x: got .*expected \[\.\.\., {K}\]"):
            call(torch.ones(shape))


def test_16_factors_that_do_not_fit():
    x, q, (A, B) = torch.randn(M, K), packed(), factors()
    for words, call in (
        (
            r"lora_A: expected shape \[4, 64\], got \[4, 63\]",
            lambda: qlinear(x, q, None, A[:, 1:], B),
        ),
        (
            r"lora_B: expected shape \[48, 4\], got \[48, 3\]",
            lambda: qlinear(x, q, None, A, B[:, 1:]),
        ),
        (
            r"lora_A: expected shape \[R, K\] with R > 0",
            lambda: qlinear(x, q, None, A[:0], B[:, :0]),
        ),
        (r"bias: expected shape \[48\], got \[47\]", lambda: qlinear(x, q, torch.randn(N - 1))),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_16_more_than_2_31_weights():
    huge = torch.zeros(1, 1).expand(2**16, 2**15)  # no memory behind it
    with pytest.raises(FormatError, match=r"\[65536, 32768\], expected fewer than 2\^31 elements"):
        fastpeft.quantize_tensor(huge)


def test_16_more_than_2_31_outputs(cuda):
    """Supported: the last rows are those of a small call."""
    rows, columns = 2**16 + 5, 2**15 + 16
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("CUDA: less than 16 GiB free")
    q = fastpeft.quantize_tensor(torch.randn(columns, K, device=cuda), "nf4")
    x = torch.randn(rows, K, device=cuda, dtype=torch.bfloat16)
    assert rows * columns > 2**31
    y = qlinear(x, q)
    exact = x[-7:].double() @ q.dequantize(torch.float64).T
    torch.testing.assert_close(y[-7:].double(), exact, atol=0.3, rtol=2e-2)
    torch.testing.assert_close(
        y[:3].double(), x[:3].double() @ q.dequantize(torch.float64).T, atol=0.3, rtol=2e-2
    )


# ---- 17 GPU, driver, build

GPU = {"index": 0, "name": "Old", "driver": "450.1", "capability": "7.5", "covered": True}
GOOD = {
    "torch": {"error": None, "version": "2.13.0+cu130", "cuda": "13.0"},
    "library": {"loads": True, "build": {"cuda": True, "cuda_archs": "80-real;90a-real"}},
    "gpus": [],
    "cuda_usable": True,
    "self_test": {"cpu": "ok"},
    "packages": dict.fromkeys(diagnosis.PACKAGES, "1"),
}


def changed(**parts):
    facts = copy.deepcopy(GOOD)
    for key, value in parts.items():
        facts[key] = {**facts[key], **value} if isinstance(value, dict) else value
    return facts


def test_17_a_good_machine_has_no_problem():
    assert diagnosis._problems(changed(gpus=[GPU])) == ([], [])


@pytest.mark.parametrize(
    ("facts", "what", "fix"),
    [
        (
            changed(gpus=[{**GPU, "covered": False}]),
            "no kernels for Old (compute capability 7.5)",
            "FASTPEFT_ARCHS='80-real;90a-real;75' pip install",
        ),
        (
            changed(gpus=[GPU], cuda_usable=False),
            "cannot use the GPU (driver 450.1)",
            "Update the NVIDIA driver",
        ),
        (
            changed(gpus=[GPU], torch={"cuda": None, "version": "2.13.0+cpu"}),
            "a GPU is there, but torch 2.13.0+cpu has no CUDA",
            "pip install --force-reinstall torch",
        ),
        (
            changed(gpus=[GPU], library={"build": {"cuda": False}}),
            "only CPU kernels were built",
            "FASTPEFT_CUDA=ON pip install",
        ),
        (changed(torch={"version": "2.10.1"}), "torch 2.10.1 is too old", "pip install -U"),
        (
            changed(library={"loads": False, "error": "libfastpeft_ops.so: got no file"}),
            "got no file",
            "pip install",
        ),
    ],
)
def test_17_what_is_missing_and_the_one_command_that_mends_it(facts, what, fix):
    problems, _ = diagnosis._problems(facts)
    assert len(problems) == 1, problems
    assert what in problems[0]["what"] and problems[0]["fix"].startswith(fix)


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        ("80-real;90a-real", (7, 5), False),
        ("80-real;90a-real", (8, 6), True),
        ("80-real;90a-real", (9, 0), True),
        ("80-real;90a-real", (10, 0), False),
        ("80-real;90-virtual", (10, 0), True),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("80", (12, 0), True),
        ("", (9, 0), False),
    ],
)
def test_17_which_gpus_an_architecture_list_serves(archs, capability, covered):
    assert diagnosis.covers(archs, capability) is covered


# ---- 19 a gradient for a quantised weight


@pytest.mark.parametrize(
    "layer",
    [fastpeft.Linear4bit(K, N), fastpeft.Linear8bit(K, N), fastpeft.QLoRALinear(K, N)],
    ids=["4bit", "8bit", "qlora"],
)
def test_19_quantised_weights_have_no_gradient(layer):
    with pytest.raises(AttributeError, match=r"has no `weight`: it is packed .*gets no gradient"):
        layer.weight.requires_grad_()
    layer.requires_grad_(True)  # what asks for parameters finds none of the weight's
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.endswith("bias") for name in names)


def test_19_a_dense_base_with_a_gradient_is_refused_by_the_operator():
    with pytest.raises(StateError, match="weight: got a tensor with requires_grad=True"):
        qlinear(torch.randn(M, K), torch.randn(N, K, requires_grad=True))


def test_deterministic_mode_has_every_path():
    """Refusal 23: no operator lacks a deterministic path, so the mode changes nothing and refuses
    nothing; a second derivative, which has none, is refused.
    """
    torch.manual_seed(3)
    layer = fastpeft.QLoRALinear(96, 40, r=4, lora_dropout=0.25)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(19, 96)

    def once() -> list[torch.Tensor]:
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_(True)
        y = layer(leaf)
        wanted = [leaf, layer.lora_A.weight, layer.lora_B.weight]
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    free = once()
    torch.use_deterministic_algorithms(True)
    try:
        strict = once()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(free, strict, strict=True))
    leaf = x.clone().requires_grad_(True)
    (first,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
