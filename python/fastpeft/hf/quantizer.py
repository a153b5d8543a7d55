"""The plug-in by which transformers' from_pretrained makes our layers, from a dense folder or a
quantised one.

While the weights come in, every layer to be has a `Pending` in its seat, an nn.Linear that
transformers knows how to fill; afterwards our layer takes the seat. A dense weight is quantised as
it arrives, so one dense layer is the peak. Of a quantised folder transformers reads the codes, and
the scales beside them are read here, checked (`QuantizedTensor.from_canonical`): the seam for
foreign packed files is the one that changes most between releases.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer

from fastpeft.attach import state_of
from fastpeft.convert import QuantizeReport, choose
from fastpeft.errors import ConfigError, FormatError, refuse
from fastpeft.folders import Checkpoint, packed_layers
from fastpeft.patterns import linear_places
from fastpeft.quant.format import FORMATS
from fastpeft.quant.frozen import QuantizedLinear
from fastpeft.quant.linear import Linear4bit, Linear8bit
from fastpeft.quant.tensor import QuantizedTensor, quantize_tensor
from fastpeft.transposed import is_conv1d

from .config import FastPeftConfig

# What lies beside the codes of a packed layer.
_BESIDE = {rf"\.{re.escape(key)}$" for f in FORMATS.values() for key in f.keys(True)[1:]}


class Pending(nn.Linear):
    """The seat of a quantised layer while weights are loaded.

    Attributes:
        weight: Parameter on meta with the shape and dtype of the file; later what was loaded.
        packed: the quantised weight, once there is one.
        is_transposed: the dense weight is [in, out] (Conv1D).
        source: tensors of the file beside the codes, by canonical name; None for a dense file.
        dtype: of the model, in which a weight without a dtype of its own is dequantised.
    """

    def __init__(self, dense: nn.Module, source: dict[str, Tensor] | None) -> None:
        nn.Module.__init__(self)
        self.is_transposed = is_conv1d(dense)
        rows, columns = dense.weight.shape
        self.in_features, self.out_features = (
            (rows, columns) if self.is_transposed else (columns, rows)
        )
        self.dtype = dense.weight.dtype
        self.source = source
        self.packed: QuantizedTensor | None = None
        self.weight, self.bias = dense.weight, dense.bias
        if source is not None:
            codes = torch.empty_like(source.pop("weight"), device="meta")
            self.weight = nn.Parameter(codes, requires_grad=False)
        self.training = dense.training

    def pack(self, weight: Tensor, config: FastPeftConfig) -> QuantizedTensor:
        """Quantises a dense weight as the file has it."""
        matrix = weight.t().contiguous() if self.is_transposed else weight
        self.packed = quantize_tensor(
            matrix.detach(), config.format, config.blocksize, config.double_quant
        )
        return self.packed

    def finish(self, name: str, config: FastPeftConfig) -> QuantizedLinear:
        """The layer that takes this seat."""
        weight = self.weight.detach()
        if self.source is not None:
            tensors = {"weight": weight, **self.source}
            shape = (self.out_features, self.in_features)
            try:
                self.packed = QuantizedTensor.from_canonical(tensors, shape, weight.device)
            except FormatError as error:
                raise FormatError(f"layer '{name}': {error}") from error
        elif self.packed is None:  # not in the file: transformers has initialised it
            self.pack(weight, config)
        assert self.packed is not None
        bias = None if self.bias is None else self.bias.detach()
        if self.packed.format == "int8":
            layer: QuantizedLinear = Linear8bit.from_quantized(self.packed, bias, config.threshold)
            layer.weight_dtype = self.dtype
        else:
            layer = Linear4bit.from_quantized(self.packed, bias)
        return layer.train(self.training)


class QuantizeWeight(ConversionOps):
    """transformers' step from a dense weight to the codes of its Pending."""

    def __init__(self, quantizer: FastPeftQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """{name of a weight: tensor} -> {the same name: packed codes}; the scales stay in the
        Pending."""
        assert model is not None
        done = {}
        for name, value in input_dict.items():
            seat = model.get_submodule(name.rpartition(".")[0])
            packed = seat.pack(
                value[0] if isinstance(value, list) else value, self._quantizer.quantization_config
            )
            seat._is_hf_initialized = True
            done[name] = packed.codes
        return done


class FastPeftQuantizer(HfQuantizer):
    """transformers' face of fastpeft.

    Attributes:
        report: what `fastpeft.quantize` reports: layers converted, what stayed dense and why.
    """

    requires_calibration = False
    quantization_config: FastPeftConfig

    def __init__(self, quantization_config: FastPeftConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report = QuantizeReport(quantization_config.format)
        self._model: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a copied or unpickled model is another one

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a weight, for transformers' memory plan."""
        return 1.0 if self.quantization_config.format == "int8" else 0.5

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses what cannot work, before anything is loaded.

        Raises:
            ConfigError: FP4 is to be made, or layers are to lie on the CPU or the disk beside a
            GPU.
        """
        if self.quantization_config.format == "fp4" and not self.pre_quantized:
            advice = "fp4 is read from files, never made."
            raise refuse(ConfigError, "format", "'fp4'", "'nf4' or 'int8'", advice)
        places = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise refuse(
                ConfigError,
                "device_map",
                sorted(places),
                "GPUs alone, or the CPU alone",
                "Packed weights are not offloaded; use a smaller model or more GPUs.",
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether this name is a weight to be packed."""
        owner, _, last = param_name.rpartition(".")
        return last == "weight" and isinstance(model.get_submodule(owner), Pending)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if self.pre_quantized:
            with Checkpoint(checkpoint_files or ()) as checkpoint:
                self._seat_packed(model, checkpoint)
            return model
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        skip = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
        for place in choose(model, (*self.quantization_config.skip, *sorted(skip)), self.report):
            place.put(Pending(place.module, None))
            self.report.converted.append(place.name)
        return model

    def _seat_packed(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """A Pending for each layer that the files hold packed."""
        layers = packed_layers(checkpoint.names)
        places = {place.name: place for place in linear_places(model)}
        prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        for layer, format in layers.items():
            names = (layer, prefix + layer, layer.removeprefix(prefix))
            place = next((places[name] for name in names if name in places), None)
            if place is None:
                raise refuse(
                    FormatError,
                    f"quantised tensors of '{layer}'",
                    "no linear layer of that name",
                    f"one in {type(model).__name__}",
                    "Load the folder with the class that its config.json names.",
                )
            place.put(Pending(place.module, checkpoint.packed(layer, format)))
            self.report.converted.append(place.name)
        # Read above; transformers need not wonder. Of this model, not its class.
        known = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = known | _BESIDE

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, seat in list(model.named_modules()):
            if isinstance(seat, Pending):
                layer = seat.finish(name, self.quantization_config)
                model.set_submodule(name, _with_hook(layer, seat))
        model.__dict__.pop("_keys_to_ignore_on_load_unexpected", None)
        self.adopt(model)
        return model

    def adopt(self, model: nn.Module) -> None:
        """Speak for this model from now on."""
        self._model = weakref.ref(model)

    def get_quantize_ops(self) -> ConversionOps:
        """The step from dense to packed."""
        return QuantizeWeight(self)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """The state dict for save_pretrained: canonical, but int8 codes as [N, K, 1], which a
        process without the plug-in cannot take for a dense weight (fastpeft/folders.py)."""
        tensors = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, Linear8bit):
                key = f"{name}.weight" if name else "weight"
                tensors[key] = tensors[key].unsqueeze(2)
        return tensors, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """What the Trainer asks of a model that is no PeftModel: whether there is something to
        train. True once an adapter is attached."""
        model = None if self._model is None else self._model()
        return model is None or state_of(model) is not None

    @property
    def is_compileable(self) -> bool:
        """The operators have fakes: generate may compile."""
        return True


def _with_hook(layer: nn.Module, seat: nn.Module) -> nn.Module:
    """accelerate's hook (a model on several GPUs) goes over to the layer."""
    hook = getattr(seat, "_hf_hook", None)
    if hook is None:
        return layer
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(seat)
    return add_hook_to_module(layer, hook)
