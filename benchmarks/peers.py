"""A frozen linear layer with LoRA, by every provider: what bench_qlinear and bench_lora race.

`make(provider, job)` gives a Peer or raises Unavailable with the reason. Peers see the same
numbers: the weight is packed once by tests/reference.py for fastpeft, and from the same 16- or
32-bit matrix by the others' own quantiser.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import harness
import torch
import torch.nn.functional as F
from cases import KINDS, Case, Inputs, Weight

PROVIDERS = (
    *("fastpeft", "torch", "dequant+torch", "bitsandbytes", "peft+bitsandbytes", "peft"),
    "humming",
)


class Unavailable(Exception):
    """The provider cannot run this problem here; the text says why.

    worth_telling: not merely that another provider is the one for this problem.
    """

    def __init__(self, reason: str, worth_telling: bool = True) -> None:
        super().__init__(reason)
        self.worth_telling = worth_telling


@dataclass
class Job:
    """One problem with its tensors."""

    case: Case
    inputs: Inputs
    dense: torch.Tensor  # W [N, K] in the activations' dtype, as it was before quantising
    direction: str  # fwd, dgrad, fwd+bwd
    device: str
    kept: dict[str, Any] = field(default_factory=dict)  # what lasts as long as the weight

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What make() gave the first time it was asked for under this name. Not on the CPU, where
        some libraries give a weight another form at the layer's first call.
        """
        if self.device == "cpu":
            return make()
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def copies(self, weight_bytes: float) -> int:
        """How many copies of a weight of this size."""
        return harness.copies_for(weight_bytes, self.device)


@dataclass
class Peer:
    """A provider's layer, once per weight copy."""

    forward: list[Callable[[torch.Tensor], torch.Tensor]]  # x [M, K] -> y [M, N]
    dgrad: list[Callable[[torch.Tensor], torch.Tensor]] | None  # dy [M, N] -> dx [M, K]; R = 0
    factors: list[tuple[torch.Tensor, ...]]  # (A, B), or () without LoRA
    bytes: float
    format: str
    graph: bool = True
    exact: torch.Tensor | None = None  # W [N, K] by its own quantiser, where that may differ


def make(provider: str, job: Job) -> Peer:
    """The provider's layer for this job.

    Raises:
        Unavailable: not installed, or it does not do this problem.
    """
    return {
        "fastpeft": _fastpeft,
        "torch": _torch,
        "dequant+torch": _dequant,
        "bitsandbytes": _bitsandbytes,
        "peft+bitsandbytes": _peft_bitsandbytes,
        "peft": _peft,
        "humming": _humming,
    }[provider](job)


def format_name(case: Case) -> str:
    """The word for `format` in a row."""
    if case.kind == "dense":
        return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[case.dtype]
    return "llm.int8" if case.kind.startswith("llm.int8") else case.kind


def _factors(job: Job) -> tuple[torch.Tensor, ...]:
    if job.inputs.A is None:
        return ()
    dtype = job.case.torch_dtype  # what autocast would make of float32 factors, without its casts
    pair = (job.inputs.A.to(dtype), job.inputs.B.to(dtype))
    return tuple(t.requires_grad_(job.direction != "fwd") for t in pair)


def _copy_weight(w: Weight) -> Weight:
    def clone(t):
        return None if t is None else t.clone()

    return replace(w, codes=clone(w.codes), scales=clone(w.scales), nested=clone(w.nested))


def packed_copies(job: Job) -> list[Weight]:
    """The packed weight as often as L2 asks for: fastpeft's, and what dequant+torch starts from."""
    copies = job.copies(job.case.weight_bytes())
    first = job.inputs.weight
    return job.keep("packed", lambda: [first] + [_copy_weight(first) for _ in range(copies - 1)])


def _fastpeft(job: Job) -> Peer:
    import kernelkit
    from fastpeft.ops.lora import LowRank
    from fastpeft.ops.qlinear import qlinear

    def input_gradient(dy: torch.Tensor, w) -> torch.Tensor:
        packed = (w.codes, w.scales, w.nested, w.format, w.blocksize, w.K)
        return torch.ops.fastpeft.qlinear_dgrad(dy, *packed, None, None, 0.0, None)

    weights = packed_copies(job)
    packed = [kernelkit.weight_of(replace(job.inputs, weight=w)) for w in weights]
    factors, bias = _factors(job), job.inputs.bias
    low = LowRank(*factors, job.inputs.scaling) if factors else None
    return Peer(
        [lambda x, w=w: qlinear(x, w, bias, low) for w in packed],
        [lambda dy, w=w: input_gradient(dy, w) for w in packed],
        [factors] * len(weights),
        job.case.bytes(job.direction),
        format_name(job.case),
    )


def _dense_case(case: Case) -> Case:
    return replace(case, kind="dense")


def _plain(x, W, bias, factors, scaling):
    y = F.linear(x, W, bias)
    return y + scaling * F.linear(F.linear(x, factors[0]), factors[1]) if factors else y


def _torch(job: Job) -> Peer:
    case, factors = _dense_case(job.case), _factors(job)
    exact, copies = job.inputs.weight.exact, job.copies(case.weight_bytes())
    weights = job.keep(
        "dense", lambda: [exact.to(case.torch_dtype, copy=True) for _ in range(copies)]
    )
    bias, scaling = job.inputs.bias, job.inputs.scaling
    return Peer(
        [lambda x, W=W: _plain(x, W, bias, factors, scaling) for W in weights],
        [lambda dy, W=W: dy @ W for W in weights],
        [factors] * copies,
        case.bytes(job.direction),
        format_name(case),
    )


def _dequant(job: Job) -> Peer:
    """fastpeft's dequantise and torch's matmul, the weight rebuilt in the backward pass."""
    from fastpeft.ops.quant import dequantize

    if job.case.kind == "dense":
        raise Unavailable("a dense weight needs no dequantising")
    if job.inputs.weight.threshold >= 0:
        raise Unavailable("LLM.int8() does not dequantise the weight")
    dtype = job.case.torch_dtype

    def dense(w: Weight) -> torch.Tensor:
        return dequantize(w.codes, w.scales, w.nested, w.format_id, w.blocksize, w.N, w.K, dtype)

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.w = w
            return F.linear(x, dense(w), job.inputs.bias)

        @staticmethod
        def backward(ctx, dy):
            return dy @ dense(ctx.w), None

    factors, weights = _factors(job), packed_copies(job)

    def forward(x, w):
        y = Linear.apply(x, w)
        if factors:
            y = y + job.inputs.scaling * F.linear(F.linear(x, factors[0]), factors[1])
        return y

    return Peer(
        [lambda x, w=w: forward(x, w) for w in weights],
        [lambda dy, w=w: dy @ dense(w) for w in weights],
        [factors] * len(weights),
        job.case.bytes(job.direction),
        format_name(job.case),
    )


def import_bitsandbytes():
    """The module, with its advice silenced: a line a call otherwise.

    Raises:
        Unavailable: not installed, or its native library does not load.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except Exception as error:  # it fails in ways of its own where its native library is missing
        raise Unavailable(f"bitsandbytes does not import: {error}") from error
    return bitsandbytes


def _bnb_layer(job: Job) -> torch.nn.Module:
    """One bitsandbytes layer over the job's weight."""
    bnb = import_bitsandbytes()
    case, dense = job.case, job.dense.clone()
    fmt, double, threshold = KINDS[case.kind]
    has_bias = job.inputs.bias is not None
    if fmt in ("nf4", "fp4"):
        if case.blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise Unavailable(f"blocksize {case.blocksize}")
        if job.device == "cpu" and case.K % case.blocksize:
            raise Unavailable("its CPU kernel is wrong where blocks straddle rows")
        layer = bnb.nn.Linear4bit(
            case.K, case.N, has_bias, case.torch_dtype, double, fmt, device="meta"
        )
        layer.weight = bnb.nn.Params4bit(
            dense,
            requires_grad=False,
            compress_statistics=double,
            quant_type=fmt,
            blocksize=case.blocksize,
            module=layer,
        )
    elif fmt == "int8" and threshold >= 0:
        layer = bnb.nn.Linear8bitLt(
            case.K, case.N, has_bias, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        # it quantises on the way from the CPU only
        layer.weight = bnb.nn.Int8Params(dense.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        raise Unavailable(f"{case.kind} is not a format of bitsandbytes")
    if has_bias:
        layer.bias = torch.nn.Parameter(job.inputs.bias.cpu(), requires_grad=False)
    return layer.to(job.device).train(job.direction == "fwd+bwd")


def _bnb_layers(job: Job) -> list[torch.nn.Module]:
    """Layers of its own over copies of one weight. A deep copy of the first: one of 800 copies of a
    small layer would take seconds, so those of 4 bits share all but the codes and scales.
    """
    copies, trains = job.copies(job.case.weight_bytes()), job.direction == "fwd+bwd"
    clone = copy.deepcopy if job.device == "cpu" else _bnb_copy

    def make() -> list[torch.nn.Module]:
        first = _bnb_layer(job)
        return [first] + [clone(first) for _ in range(copies - 1)]

    return [layer.train(trains) for layer in job.keep("bitsandbytes", make)]


def _bnb_copy(layer: torch.nn.Module) -> torch.nn.Module:
    import bitsandbytes as bnb

    if not isinstance(layer, bnb.nn.Linear4bit):
        return copy.deepcopy(layer)
    other = copy.copy(layer)
    other._parameters, state = dict(layer._parameters), copy.copy(layer.weight.quant_state)
    state.absmax = state.absmax.clone()
    weight = bnb.nn.Params4bit(
        layer.weight.data.clone(),
        requires_grad=False,
        quant_state=state,
        blocksize=layer.weight.blocksize,
        compress_statistics=layer.weight.compress_statistics,
        quant_type=layer.weight.quant_type,
        quant_storage=layer.weight.quant_storage,
        bnb_quantized=True,
        module=other,
    )
    other._parameters["weight"] = weight
    other.quant_state = state
    return other


def _bnb_dgrad(layer: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What its backward pass does for dx."""
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear4bit):

        def dgrad(dy):
            W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            return dy @ W.to(dy.dtype)
    else:

        def dgrad(dy):
            state = layer.state
            codes, scale = (
                (state.CB, state.SCB)
                if state.CB is not None
                else (layer.weight.CB, layer.weight.SCB)
            )
            return dy @ codes.to(dy.dtype, copy=True).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))

    return dgrad


def _own_weight(layer: torch.nn.Module) -> torch.Tensor | None:
    """W [N, K] as a 4-bit layer of bitsandbytes holds it: on the GPU its quantiser rounds
    otherwise.
    """
    import bitsandbytes as bnb

    if not isinstance(layer, bnb.nn.Linear4bit):
        return None
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def _can_capture(job: Job) -> bool:
    """With a threshold, bitsandbytes asks the GPU which columns are outliers and waits for the
    answer.
    """
    return not (KINDS[job.case.kind][2] > 0)


def _bitsandbytes(job: Job) -> Peer:
    if job.inputs.A is not None:
        raise Unavailable("has no LoRA of its own: see peft+bitsandbytes", False)
    layers = _bnb_layers(job)
    return Peer(
        list(layers),
        [_bnb_dgrad(layer) for layer in layers],
        [()] * len(layers),
        job.case.bytes(job.direction),
        format_name(job.case),
        _can_capture(job),
        _own_weight(layers[0]),
    )


def _lora_of_peft(job: Job, layers: list[torch.nn.Module], flag: str | None) -> Peer:
    try:
        import peft
    except ImportError as error:
        raise Unavailable(f"peft does not import: {error}") from error
    R, trains = job.case.R, job.direction == "fwd+bwd"

    def make() -> tuple[torch.nn.Module, list[tuple[torch.Tensor, ...]]]:
        holder = torch.nn.Module()
        holder.proj = torch.nn.ModuleList(layers)
        if flag:
            setattr(holder, flag, True)
        config = peft.LoraConfig(
            r=R, lora_alpha=job.inputs.scaling * R, target_modules=r"proj\.\d+", lora_dropout=0.0
        )
        peft.get_peft_model(holder, config, autocast_adapter_dtype=False)
        factors = []
        for layer in holder.proj:
            pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            for parameter, value in zip(pair, _factors(job), strict=True):
                parameter.data = value.detach().clone()
                parameter.requires_grad_(trains)
            factors.append(pair)
        return holder, factors

    holder, factors = job.keep(f"peft {R} {trains}", make)
    return Peer(
        list(holder.train(trains).proj),
        None,
        factors,
        job.case.bytes(job.direction),
        format_name(job.case),
        _can_capture(job),
    )


def _peft_bitsandbytes(job: Job) -> Peer:
    if job.inputs.A is None:
        raise Unavailable("no LoRA asked for: see bitsandbytes", False)
    layers = _bnb_layers(job)
    own = _own_weight(layers[0])
    four = KINDS[job.case.kind][0] in ("nf4", "fp4")
    peer = _lora_of_peft(job, layers, "is_loaded_in_4bit" if four else "is_loaded_in_8bit")
    return replace(peer, exact=own)


def _peft(job: Job) -> Peer:
    """peft's LoRA on a dense layer."""
    if job.case.kind != "dense" or job.inputs.A is None:
        raise Unavailable("peft alone: dense weight with LoRA")
    copies, layers = job.copies(job.case.weight_bytes()), []
    for _ in range(copies):
        bias = job.inputs.bias
        layer = torch.nn.Linear(job.case.K, job.case.N, bias is not None, device="meta")
        layer.weight = torch.nn.Parameter(job.dense.clone(), requires_grad=False)
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
        layers.append(layer)
    return _lora_of_peft(job, layers, None)


def _humming_layer(job: Job) -> torch.nn.Module:
    """Its own quantiser: integers of 4 bits in groups of 64 for any 4-bit race, int8 by rows."""
    fmt, _, threshold = KINDS[job.case.kind]
    if job.case.R or job.direction != "fwd" or threshold >= 0 or fmt == "dense":
        raise Unavailable("does weight-only 4-bit and int8 layers forward, without LoRA", False)
    if job.device == "cpu" or job.case.dtype == "float32":
        raise Unavailable("wants CUDA and 16 bits", False)
    config = {"dtype": "int8"} if fmt == "int8" else {"dtype": "int4", "group_size": 64}
    try:
        from humming.layer import HummingLayer

        case = job.case
        layer = HummingLayer(
            case.N, case.K, weight_config=config, torch_dtype=case.torch_dtype
        ).cuda()
        layer.load_from_unquantized(job.dense)
        layer.transform()
        layer(job.inputs.x)  # compiles
    except Exception as error:  # a missing compiler, a shape it has no tile for, ...
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unavailable(f"humming: {text}") from error
    return layer


def _humming(job: Job) -> Peer:
    layer = _humming_layer(job)
    case, bits = job.case, 4 if KINDS[job.case.kind][0] != "int8" else 8
    scale_bytes = 2 * case.N * (case.K // 64 if bits == 4 else 1)
    weight_bytes = case.N * case.K * bits / 8 + scale_bytes
    copies = job.copies(weight_bytes)
    layers = job.keep(
        "humming", lambda: [layer] + [copy.deepcopy(layer) for _ in range(copies - 1)]
    )
    unit = torch.eye(case.K, dtype=case.torch_dtype, device=job.device)
    exact = torch.cat([layer(rows).float() for rows in unit.split(4096)]).t().contiguous()
    loss = float((exact - job.dense.float()).norm() / job.dense.float().norm())
    if loss > (0.2 if bits == 4 else 0.02):  # what it holds is no quantised form of this weight
        raise Unavailable(f"humming: its weight is off by {loss:.2f}")
    return Peer(
        list(layers),
        None,
        [()] * len(layers),
        case.bytes("fwd") - case.weight_bytes() + weight_bytes,
        "int8" if bits == 8 else "int4-g64",
        exact=exact,
    )
