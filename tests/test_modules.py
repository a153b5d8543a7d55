"""Linear4bit and Linear8bit as modules: values, casts, copies, files, meta device, autocast,
checkpointing, compilation.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import fastpeft
import pytest
import torch
from fastpeft import Linear4bit, Linear8bit
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

K, N = 80, 48
KINDS = {
    "nf4": lambda m: Linear4bit.from_linear(m),
    "nf4 flat": lambda m: Linear4bit.from_linear(m, blocksize=32, double_quant=False),
    # a block size that divides in_features: scales in another order, so a wider layer
    "nf4 column": lambda m: Linear4bit.from_linear(nn.Linear(128, N)),
    "int8": lambda m: Linear8bit.from_linear(m, threshold=6.0),
    "int8 weight": lambda m: Linear8bit.from_linear(m, threshold=None),
}


@pytest.fixture(params=list(KINDS))
def layer(request):
    return KINDS[request.param](nn.Linear(K, N))


def x_for(layer, dtype=torch.float32, requires_grad=False) -> torch.Tensor:
    return torch.randn(2, 3, layer.in_features, dtype=dtype).requires_grad_(requires_grad)


def buffers(layer) -> list[torch.Tensor]:
    return [t for t in (layer.codes, layer.scales, layer.nested) if t is not None]


def same_buffers(a, b) -> bool:
    return all(
        x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(buffers(a), buffers(b), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_dtype(layer, dtype):
    x = x_for(layer, dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, N)
    exact = F.linear(x.double(), layer.dequantize(torch.float64), layer.bias.double())
    limit = 0.02 if getattr(layer, "threshold", None) is None else 0.1
    assert (y.double() - exact).abs().max() < limit * exact.abs().max()


def test_from_linear_leaves_the_source_alone():
    dense = nn.Linear(K, N)
    before = copy.deepcopy(dense)
    layer = Linear4bit.from_linear(dense)
    with torch.no_grad():
        layer.bias.zero_()
    assert torch.equal(dense.weight, before.weight) and torch.equal(dense.bias, before.bias)
    assert dense.weight.requires_grad and not layer.bias.requires_grad
    assert Linear4bit.from_linear(nn.Linear(K, N, bias=False)).bias is None
    assert not Linear4bit.from_linear(dense.eval()).training


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: m.to("cpu", torch.float16),
    ],
)
def test_casts_move_the_bias_only(layer, cast):
    before = copy.deepcopy(layer)
    cast(layer)
    assert same_buffers(layer, before)
    assert layer.bias.dtype != torch.float32
    assert torch.equal(layer.dequantize(torch.float32), before.dequantize(torch.float32))


def test_casts_inside_a_model():
    model = nn.Sequential(Linear4bit.from_linear(nn.Linear(64, 64)), nn.LayerNorm(64)).half()
    assert model[0].nested.dtype == torch.float32 and model[0].scales.dtype == torch.uint8
    assert model[1].weight.dtype == torch.float16
    assert model(torch.randn(2, 64).half()).dtype == torch.float16


def test_copies(layer):
    other = copy.deepcopy(layer)
    x = x_for(layer)
    assert same_buffers(layer, other) and torch.equal(layer(x), other(x))
    assert other.codes.data_ptr() != layer.codes.data_ptr()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.codes.zero_()
    assert str(other.load_state_dict(torch.load(file, weights_only=True))).startswith("<All keys")
    assert torch.equal(layer(x), other(x))


def blank_like(layer, device=None):
    """A layer of the same sizes with another weight."""
    sizes = (layer.in_features, layer.out_features)
    if isinstance(layer, Linear8bit):
        return Linear8bit(*sizes, threshold=layer.threshold, device=device)
    options = {"blocksize": layer.blocksize, "double_quant": layer.double_quant}
    return Linear4bit(*sizes, **options, device=device)


def test_state_dict_round_trip(layer):
    state = load_safetensors(save_safetensors(layer.state_dict()))
    other = blank_like(layer)
    assert not same_buffers(other, layer)
    addresses = [t.data_ptr() for t in buffers(other)]
    other.load_state_dict(state, strict=True)
    assert same_buffers(other, layer) and torch.equal(other.bias, layer.bias)
    assert [t.data_ptr() for t in buffers(other)] == addresses  # in place, for CUDA graphs
    x = x_for(layer)
    assert torch.equal(other(x), layer(x)) and other(x[:0]).shape == (0, 3, N)
    for name, t in layer.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name


def test_files_travel_between_devices(layer, device):
    moved = copy.deepcopy(layer).to(device)
    assert {t.device.type for t in [*buffers(moved), moved.bias]} == {device}
    assert torch.equal(moved.dequantize().cpu(), layer.dequantize())
    assert moved(x_for(layer).to(device)).device.type == device
    for name, t in moved.state_dict().items():
        assert t.device.type == device and torch.equal(t.cpu(), layer.state_dict()[name]), name
    for source, target in ((moved, blank_like(layer)), (layer, blank_like(layer, device))):
        where = target.codes.device
        target.load_state_dict(source.state_dict())
        assert target.codes.device == where and same_buffers(target.cpu(), layer)


def test_state_dict_names():
    prefix = "weight.quant_state.bitsandbytes__nf4"
    nested = {"weight.nested_absmax", "weight.nested_quant_map"}
    layer = Linear4bit.from_linear(nn.Linear(K, N))
    assert set(layer.state_dict()) == nested | {
        "weight",
        "weight.absmax",
        "weight.quant_map",
        prefix,
        "bias",
    }
    eight = Linear8bit.from_linear(nn.Linear(K, N, bias=False))
    assert set(eight.state_dict()) == {"weight", "SCB", "weight_format"}


def test_file_decides_blocksize_and_scales():
    """A checkpoint with other options than the layer's loads: the weight is what the file says."""
    source = Linear4bit.from_linear(nn.Linear(K, N), blocksize=32, double_quant=False)
    other = Linear4bit(K, N, blocksize=64, double_quant=True)
    other.load_state_dict(source.state_dict())
    assert same_buffers(other, source) and (other.blocksize, other.double_quant) == (32, False)
    x = x_for(source)
    assert torch.equal(other(x), source(x))
    source.codes.zero_()
    assert not torch.equal(other.codes, source.codes)  # its own memory


def test_bitsandbytes_layer_loads_and_is_the_same_file():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    dense = nn.Linear(128, N)
    theirs = bnb.nn.Linear4bit(128, N, quant_type="nf4", compress_statistics=True)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")
    state = theirs.state_dict()
    ours = Linear4bit(128, N)
    ours.load_state_dict(state)
    back = ours.state_dict()
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)
    assert same_buffers(ours, Linear4bit.from_linear(dense))


@pytest.mark.filterwarnings("ignore:for bias. copying from a non-meta parameter")
def test_meta_then_assign_or_to_empty(layer):
    for device in ("argument", "context"):
        if device == "argument":
            meta = blank_like(layer, "meta")
        else:
            with torch.device("meta"):
                meta = blank_like(layer)
        assert all(t.is_meta for t in buffers(meta)) and meta.bias.is_meta
        shapes = {
            name: t.shape for name, t in layer.state_dict().items() if "quant_state" not in name
        }
        assert {n: t.shape for n, t in meta.state_dict().items() if n in shapes} == shapes
        with pytest.raises(RuntimeError, match="a layer on meta.*assign=True"):
            meta.load_state_dict(layer.state_dict())
        x = x_for(layer)
        assigned = copy.deepcopy(meta)
        assigned.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
        emptied = meta.to_empty(device="cpu")
        emptied.load_state_dict(layer.state_dict())
        for other in (assigned, emptied):
            assert same_buffers(other, layer) and torch.equal(other(x), layer(x))


def test_quantising_a_meta_layer_takes_its_sizes():
    meta = Linear4bit.from_linear(nn.Linear(K, N, device="meta"))
    assert meta.codes.is_meta and meta.extra_repr().startswith(f"in_features={K}")


def load_error(layer, state) -> str:
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(state)
    return str(caught.value)


def test_load_refusals():
    layer = Linear4bit.from_linear(nn.Linear(K, N))
    state = layer.state_dict()
    dense = nn.Linear(K, N).state_dict()
    assert "Load the plain model first, then call fastpeft.quantize" in load_error(layer, dense)
    text = load_error(layer, {})
    assert "Missing key(s)" in text and "weight.absmax" in text and "bias" in text
    assert 'Unexpected key(s) in state_dict: "extra"' in load_error(layer, {**state, "extra": K})
    wrong = Linear4bit.from_linear(nn.Linear(N, K)).state_dict()
    assert f"shape [{K}, {N}], expected [{N}, {K}]" in load_error(layer, wrong)
    gone = {k: v for k, v in state.items() if k != "weight.absmax"}
    assert "missing ['weight.absmax']" in load_error(layer, gone)
    eight = Linear8bit.from_linear(nn.Linear(K, N)).state_dict()
    assert "quant_state" in load_error(layer, eight)
    model = nn.Sequential(layer)
    assert "0: quantised weight" in load_error(model, {f"0.{k}": v for k, v in gone.items()})
    for name, t in layer.state_dict().items():  # nothing was half loaded
        assert torch.equal(t, state[name])


def test_no_weight_attribute(layer):
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"has no `weight`.*gets no gradient.*dequantize\(\)"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = layer.nonsense


def test_refusals():
    layer = Linear4bit.from_linear(nn.Linear(K, N))
    for make in (Linear4bit.from_linear, Linear8bit.from_linear):
        with pytest.raises(
            fastpeft.StateError, match=r"Linear4bit\(nf4\).*It is quantised already"
        ):
            make(layer)
        with pytest.raises(
            fastpeft.ConfigError, match="linear: got Conv2d, expected torch.nn.Line"
        ):
            make(nn.Conv2d(1, 1, 1))
    with pytest.raises(fastpeft.FormatError, match="format: got 'int8', expected 'nf4' or 'fp4'"):
        Linear4bit(K, N, format="int8")
    with pytest.raises(fastpeft.FormatError, match="blocksize: got 48"):
        Linear4bit(K, N, blocksize=48)
    for threshold in (-1.0, "6", True, float("nan")):
        with pytest.raises(fastpeft.ConfigError, match="threshold: got .*6.0 is the value"):
            Linear8bit(K, N, threshold=threshold)
    with pytest.raises(fastpeft.ConfigError, match=rf"x: got .*, expected \[..., {K}\]"):
        layer(torch.randn(3, N))


def test_fp4_is_loaded_not_made():
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    W = torch.randn(N, 128)
    codes, state = bnb.quantize_4bit(W, quant_type="fp4", blocksize=64)
    file = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()} | {"weight": codes}
    for layer in (Linear4bit(128, N, False, "fp4"), Linear4bit(128, N, False, "nf4")):
        layer.load_state_dict(file)
        assert layer.format == "fp4"
        assert torch.equal(layer.dequantize(), bnb.dequantize_4bit(codes, state))


def test_gradient_of_x_and_bias(layer):
    layer.threshold = None
    layer.bias.requires_grad_(True)
    x = x_for(layer, requires_grad=True)
    layer(x).square().sum().backward()
    W = layer.dequantize()
    x2, bias = x.detach().clone().requires_grad_(True), layer.bias.detach().requires_grad_(True)
    F.linear(x2, W, bias).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-4, atol=1e-3)


def test_llm_int8_gradient_is_that_of_the_weight():
    layer = Linear8bit.from_linear(nn.Linear(K, N), threshold=2.0)
    x = x_for(layer, requires_grad=True)
    dy = torch.randn(2, 3, N)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.dequantize(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(layer, dtype):
    x = x_for(layer, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, layer(x.to(dtype)))
        assert layer(x.double()).dtype == torch.float64
        y.float().sum().backward()  # also inside the context: gradients keep their dtypes
    assert x.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    torch.manual_seed(2)
    model = nn.Sequential(
        fastpeft.QLoRALinear(64, 64, r=4, lora_dropout=0.3, init_lora_weights=False),
        nn.GELU(),
        fastpeft.QLoRALinear(64, 32, r=4, lora_dropout=0.3, init_lora_weights=False),
    )
    x = torch.randn(5, 64, requires_grad=True)

    def grads(run):
        torch.manual_seed(3)
        model.zero_grad()
        x.grad = None
        run().square().sum().backward()
        return [x.grad] + [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = grads(lambda: model(x))
    saved = grads(lambda: checkpoint(model, x, use_reentrant=use_reentrant))
    assert len(plain) == 5
    for a, b in zip(plain, saved, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiles_fullgraph(kind):
    layer = KINDS[kind](nn.Linear(K, N))
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, fast):
        x = torch.linspace(-1, 1, 4 * K).reshape(4, K).requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        y.float().square().sum().backward()
        results.append((y, x.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compiled_sizes_may_change():
    layer = Linear4bit.from_linear(nn.Linear(K, N))
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 8):
        x = torch.randn(rows, K)
        assert torch.equal(fast(x), layer(x))


def test_meta_input_gives_meta_output():
    """Shapes without memory, as tools that plan memory ask for them."""
    layer = fastpeft.QLoRALinear(K, N, device="meta")
    x = torch.empty(2, 5, K, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.is_meta and y.shape == (2, 5, N) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.lora_A.weight.grad.shape == (8, K)


def test_repr_tells_format_and_bytes():
    layer = Linear4bit.from_linear(nn.Linear(K, N))
    for piece in ("format=nf4", "blocksize=64", "double_quant=True", f"bytes={layer.nbytes}"):
        assert piece in repr(layer)
    assert "threshold=6.0" in repr(Linear8bit(K, N)) and "format=int8" in repr(Linear8bit(K, N))


def test_import_is_light():
    """`import fastpeft` pulls in neither torch nor transformers, and starts no GPU."""
    code = (
        "import sys, fastpeft; assert 'QLoRALinear' in dir(fastpeft); "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules); "
        "import fastpeft.attach, fastpeft.merge; "
        "assert callable(fastpeft.attach) and callable(fastpeft.merge); "
        "assert fastpeft.LoRALinear and not {'transformers', 'peft'} & set(sys.modules); "
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_are_documented():
    for name in fastpeft.__all__:
        if name not in ("hf", "__version__"):
            assert getattr(fastpeft, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fastpeft.nonsense


def test_missing_library_says_how_to_build(tmp_path, monkeypatch):
    from fastpeft import _library

    monkeypatch.setattr(_library, "_loaded", None)
    monkeypatch.setattr(_library, "library_path", lambda: tmp_path / "libfastpeft_ops.so")
    with pytest.raises(fastpeft.LibraryError, match="got no file at .*Build them with: pip inst"):
        _library.load()
    (tmp_path / "libfastpeft_ops.so").write_bytes(b"no library")
    with pytest.raises(ImportError, match="does not load .*rebuild with: pip install"):
        _library.load()
    facts = _library.facts()
    assert facts["exists"] and not facts["loads"] and "does not load" in facts["error"]
