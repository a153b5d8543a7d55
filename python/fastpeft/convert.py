"""quantize: turn the linear layers of a model into quantised ones, in place, one at a time."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastpeft.attach import state_of
from fastpeft.copies import TrainedCopy
from fastpeft.distributed import keep_local
from fastpeft.errors import ConfigError, StateError, refuse
from fastpeft.folders import SavedAs
from fastpeft.patterns import Place, is_quantized, linear_places, places
from fastpeft.quant.format import FORMATS
from fastpeft.quant.linear import Linear4bit, Linear8bit
from fastpeft.report import table, tensor_bytes
from fastpeft.transposed import is_conv1d

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True)
class LayerError:
    """What quantising did to the weight W [N, K] of a layer.

    relative: |stored - W| / |W|, Frobenius norms in float32. largest: max |stored - W|.
    bytes_before, bytes_after: of the weight with its scales.
    """

    relative: float
    largest: float
    bytes_before: int
    bytes_after: int


@dataclass
class QuantizeReport:
    """What `quantize` did.

    format: "nf4" or "int8".
    converted: plain names of the layers that are quantised now.
    skipped: {plain name of a module or parameter with a matrix: why it was left dense}.
    bytes_before, bytes_after: of all parameters and buffers, shared memory counted once.
    errors: {plain name: LayerError} of the converted layers, if `measure` was asked.
    """

    format: str
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    errors: dict[str, LayerError] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            ("converted", f"{len(self.converted)} layers to {self.format}"),
            ("bytes before", f"{self.bytes_before:,}"),
            ("bytes after", f"{self.bytes_after:,}"),
        ]
        return table(rows + [(f"left dense: {name}", why) for name, why in self.skipped.items()])


def quantize(
    model: nn.Module,
    format: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    threshold: float | None = 6.0,
    skip: Iterable[str] = ("lm_head",),
    progress: bool | Callable[[int, int, str], None] = False,
    measure: bool = False,
) -> QuantizeReport:
    """Quantise every linear layer of `model` (nn.Linear, transformers' Conv1D) in place, with or
    without adapters on it.

    Embeddings, layers that share their weight with another module, heads in `skip` and what is no
    linear layer stay as they are; expert weights kept as 3-D parameters are named in a warning.
    A transformers model is saved by its save_pretrained as a bitsandbytes folder
    (fastpeft/folders.py).
    Layer by layer, so that the peak is one dense layer above what the model needs anyway.

    Args:
        model: weights in float32, bfloat16 or float16, on any device but meta.
        format: "nf4" (Dettmers et al. 2023) or "int8" (Dettmers et al. 2022).
        blocksize: weights that share a scale, 4-bit only: a power of two in 32 ... 4096.
        double_quant: quantise the scales too, 4-bit only.
        threshold: int8 only: LLM.int8()'s outlier threshold; 0: none; None: only the weights are
            int8.
        skip: names, or parts of names between dots, of modules to leave dense with all that is in
            them.
        progress: True shows a bar on stderr; or a function of (done, total, name).
        measure: fill `errors` of the report; costs one dequantised layer at a time.

    Raises:
        ConfigError: unknown format or one that can only be read; StateError: the model is
        quantised, on meta, or an adapter is merged. All before anything is changed.
    """
    if format not in FORMATS or format == "fp4":
        raise refuse(
            ConfigError,
            "format",
            repr(format),
            "'nf4' or 'int8'",
            "fp4 is read from files, never made.",
        )
    _refuse_state(model)
    report = QuantizeReport(format, bytes_before=tensor_bytes(model))
    work = choose(model, tuple(skip), report)
    _refuse_meta(work)
    total, show = len(work), _progress(progress)
    while work:
        name, error = _convert(work, format, blocksize, double_quant, threshold, measure)
        report.converted.append(name)
        if error is not None:
            report.errors[name] = error
        show(len(report.converted), total, name)
    report.bytes_after = tensor_bytes(model)
    keep_local(model)
    if report.converted and hasattr(model, "save_pretrained") and hasattr(model, "config"):
        model.config.quantization_config = SavedAs(model)
    return report


def choose(model: nn.Module, skip: tuple[str, ...], report: QuantizeReport) -> deque[Place]:
    """The layers to convert; the report learns what is left and why. `model` may be on meta."""
    work: deque[Place] = deque()
    owners = _owners(model)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())  # of a transformers model
    for place in linear_places(model):
        why = _reason_to_skip(place, skip, owners)
        if why is None and kept & set(place.name.split(".")):
            why = "transformers keeps it dense: the model's code asks for its weight"
        if why is None:
            work.append(place)
        else:
            report.skipped[place.name] = why
    _note_others(model, report)
    return work


def _convert(
    work: deque[Place],
    format: str,
    blocksize: int,
    double_quant: bool,
    threshold: float | None,
    measure: bool,
) -> tuple[str, LayerError | None]:
    """Convert the first place of `work`, which leaves it: nothing holds the dense weight then."""
    place = work.popleft()
    module = place.module
    dense = _as_linear(module)
    if format == "int8":
        new = Linear8bit.from_linear(dense, threshold=threshold)
    else:
        new = Linear4bit.from_linear(
            dense, format=format, blocksize=blocksize, double_quant=double_quant
        )
    new.train(module.training)
    for hooks in _HOOKS:
        getattr(new, hooks).update(getattr(module, hooks))
    place.put(new)
    return place.name, layer_error(dense.weight.detach(), new) if measure else None


def layer_error(weight: Tensor, layer: Linear4bit | Linear8bit) -> LayerError:
    """How far the weight [N, K] that `layer` computes with is from `weight`."""
    exact = weight.float()
    difference = layer.dequantize(torch.float32).sub_(exact)
    norm = float(exact.norm())
    return LayerError(
        relative=float(difference.norm()) / norm if norm else 0.0,
        largest=float(difference.abs().max()),
        bytes_before=weight.nbytes,
        bytes_after=layer.nbytes,
    )


def _as_linear(module: nn.Module) -> nn.Linear:
    """A Conv1D [in, out] as nn.Linear [out, in]; nn.Linear as it is."""
    if not is_conv1d(module):
        return module
    linear = nn.Linear(*module.weight.shape, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = module.bias
    return linear


def _refuse_state(model: nn.Module) -> None:
    done = [place.name for place in places(model) if is_quantized(place.module)]
    if done:
        raise refuse(
            StateError,
            "model",
            f"{len(done)} quantised layers ('{done[0]}', ...)",
            "a dense model",
            "It is quantised already; load it anew to use another format.",
        )
    foreign = [
        place.name
        for place in places(model)
        if isinstance(place.module, nn.Linear) and not place.module.weight.is_floating_point()
    ]
    if foreign or getattr(model, "is_quantized", False):
        what = f"'{foreign[0]}', ..." if foreign else getattr(model, "quantization_method", "?")
        raise refuse(
            StateError,
            "model",
            f"another library's quantised weights ({what})",
            "a dense model",
            "Convert bitsandbytes' by fastpeft.hf.from_bitsandbytes, or load the model dense.",
        )
    state = state_of(model)
    if state is not None and state.merged is not None:
        raise refuse(
            StateError,
            "model",
            f"adapter '{state.merged}' merged into it",
            "an unmerged one",
            "Call unmerge(model) first.",
        )


def _refuse_meta(work: Iterable[Place]) -> None:
    for place in work:
        if any(p.is_meta for p in place.module.parameters(recurse=False)):
            raise refuse(
                StateError,
                f"layer '{place.name}'",
                "a weight on meta",
                "data",
                "Load the weights first, or quantise while loading by fastpeft.hf.FastPeftConfig.",
            )


def _reason_to_skip(
    place: Place, skip: tuple[str, ...], owners: dict[int, list[str]]
) -> str | None:
    dotted = f".{place.name}."
    for word in skip:
        if f".{word}." in dotted:
            return f"'{word}' is in skip"
    if place.wrapper(TrainedCopy) is not None:
        return "it is trained whole (modules_to_save)"
    sharers = [name for name in owners[id(place.module.weight)] if name != place.name]
    if sharers:
        return f"it shares its weight with '{sharers[0]}'"
    module = place.module
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"its class {type(module).__name__} has a forward of its own"
    return None


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """{id of a parameter: plain names of the modules that hold it}."""
    found: dict[int, list[str]] = {}
    for place in places(model):
        for parameter in place.module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(place.name)
    return found


def _note_others(model: nn.Module, report: QuantizeReport) -> None:
    """Name what has a matrix and is no linear layer; experts kept as 3-D parameters are the bulk of
    a model: say it loud.
    """
    linear = {place.name for place in linear_places(model)}
    experts = []
    for place in places(model):
        if place.name in linear or isinstance(place.module, nn.MultiheadAttention):
            continue
        for key, parameter in place.module._parameters.items():
            if parameter is None or parameter.dim() < 2:
                continue
            name = f"{place.name}.{key}"
            if isinstance(place.module, (nn.Embedding, nn.EmbeddingBag)):
                report.skipped[name] = "embedding"
            elif isinstance(place.module, _CONVOLUTIONS):
                report.skipped[name] = "convolution"
            elif parameter.dim() >= 3:
                report.skipped[name] = (
                    f"a {parameter.dim()}-D parameter {list(parameter.shape)} (experts?)"
                )
                experts.append(name)
            else:
                report.skipped[name] = (
                    f"a parameter of {type(place.module).__name__}, no linear layer"
                )
    if experts:
        warnings.warn(
            f"quantize: {len(experts)} parameters of 3 or more dimensions stay dense "
            f"({', '.join(experts[:3])}, ...): expert weights stored this way are not supported. "
            "The report lists them.",
            stacklevel=3,
        )


def _progress(progress: bool | Callable[[int, int, str], None]) -> Callable[[int, int, str], None]:
    if callable(progress):
        return progress
    if not progress:
        return lambda done, total, name: None
    from tqdm import tqdm  # comes with transformers

    bar = tqdm(desc="quantize", unit="layer", leave=False)

    def show(done: int, total: int, name: str) -> None:
        bar.total = total
        bar.update(1)
        if done == total:
            bar.close()

    return show
