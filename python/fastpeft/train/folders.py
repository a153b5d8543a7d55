"""Model folder -> model folder: quantised, or with an adapter merged in. What the command line's
`quantize` and `merge` do; a folder appears whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import QuantizeReport, quantize
from ..errors import ConfigError, FormatError, StateError, refuse
from ..files import replace_folder
from ..folders import quantization_config
from ..patterns import is_quantized, linear_places, places
from ..transposed import is_conv1d
from .base import model_folder, quiet_libraries
from .blocks import tokenize
from .heldout import heldout_loss, windows
from .reporter import Reporter
from .sources import read

DTYPES = ("auto", "float32", "bfloat16", "float16")


def quantized_format(model: str) -> str | None:
    """The format of a quantised model folder (or "smollm2"), None for a dense one.

    Raises:
        ConfigError: no folder, or another library's quantisation.
    """
    said = quantization_config(model_folder(model))
    if said is None:
        return None
    from ..hf.folder import our_config

    return our_config(said).format


def open_quantized(model: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer of a quantised folder. dtype: of what is not quantised."""
    return open_folder(model, dtype, device), open_tokenizer(model_folder(model))


def open_folder(model: str, dtype: str, device: torch.device) -> Any:
    """The model of a folder on its device, in evaluation mode; dtype "auto": as stored.

    Raises:
        ConfigError: no such folder or dtype.
    """
    if dtype not in DTYPES:
        raise refuse(ConfigError, "dtype", repr(dtype), " or ".join(DTYPES), "Choose one.")
    from ..hf.folder import load_model

    quiet_libraries()
    folder = model_folder(model)
    return load_model(folder, dtype if dtype == "auto" else getattr(torch, dtype), device)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        text = str(error).strip().split("\n")[0]
        advice = "Copy the tokenizer's files into the folder."
        raise refuse(ConfigError, f"folder {folder}", text, "a tokenizer", advice) from error


def quantize_folder(
    model: str,
    output: Path,
    format: str = "nf4",
    *,
    text: Iterable[str] = (),
    seq_len: int = 512,
    save_as: str = "auto",
    dtype: str = "auto",
    device: torch.device | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantise a dense model folder.

    Args:
        model: the folder, or "smollm2".
        output: the folder to make.
        format: "nf4" or "int8".
        text: sources (sources.py) on which the loss is measured before and after.
        seq_len: context of that measurement.
        save_as: "bitsandbytes", "fastpeft" (see fastpeft/folders.py), or "auto": the former where
            it can express the model.
        dtype: of the weights that are quantised and of the rest; "auto": as stored.
        device: where the work is done; default: the CPU.
        overwrite: replace an output folder that is there.
        options: of `fastpeft.quantize`: blocksize, double_quant, threshold, skip.

    Returns:
        Facts: errors (one LayerError a layer), skipped, bytes, save_as, loss_before and loss_after
        in nats a token (None without text).

    Raises:
        ConfigError: no folder, no text, a model that is no causal LM with `text`.
        StateError: it is quantised already. FormatError: save_as cannot express it.
    """
    begin, tell = time.perf_counter(), reporter or Reporter()
    source = model_folder(model)
    if quantization_config(source) is not None:
        advice = "Quantise the dense model it was made from."
        raise refuse(StateError, "model", f"{source}, quantised already", "a dense one", advice)
    refuse_output(output, overwrite)
    base = open_folder(model, dtype, device or torch.device("cpu"))
    tokens = held_tokens(base, source, text)
    before = None if tokens is None else _loss(base, tokens, seq_len, "loss before", tell)
    report = quantize(base, format, progress=_layers(tell), measure=True, **options)
    after = None if tokens is None else _loss(base, tokens, seq_len, "loss after", tell)
    tell.close()
    if not report.converted:
        advice = "Look at --skip."
        raise refuse(StateError, f"model {source}", "no layer to quantise", "one", advice)
    name = write_quantized(base, source, output, save_as, overwrite)
    return {
        **_facts(report, source, output),
        "save_as": name,
        "loss_before": before,
        "loss_after": after,
        "tokens": 0 if tokens is None else tokens.numel() - 1,
        "seconds": time.perf_counter() - begin,
    }


def merge_folder(
    base: str,
    adapter: Path,
    output: Path,
    *,
    format: str = "none",
    requantize: bool = False,
    save_as: str = "auto",
    dtype: str = "auto",
    device: torch.device | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fold an adapter into its base and save the result as a plain model folder.

    Args:
        base: model folder, dense or quantised, or "smollm2".
        adapter: folder of an adapter that is a change of weights.
        output: the folder to make.
        format: "nf4" or "int8" quantises a dense base first, as the adapter's training did; the
            adapter is then added to exactly the weight it was trained on.
        requantize: write the layers quantised again (the base must be); otherwise all is dense.
        save_as, device, overwrite: as for `quantize_folder`.
        dtype: of the dense weights that are written; "auto": as the base's.

    Returns:
        Facts: errors {layer: relative error of the stored weight against the exact sum}, bytes.

    Raises:
        AdapterError, ConfigError, StateError: as load_adapter, quantize and merge.
    """
    from ..io import load_adapter
    from ..merge import merge, settle

    begin = time.perf_counter()
    source = model_folder(base)
    there = quantized_format(base)
    if there is not None and format not in ("none", there):
        advice = "Leave --format out: the folder is quantised already."
        raise refuse(ConfigError, "--format", repr(format), repr(there), advice)
    refuse_output(output, overwrite)
    model = open_folder(base, dtype, device or torch.device("cpu"))
    if there is None and format != "none":
        quantize(model, format)
    for place in places(model):
        if is_quantized(place.module):  # the merged weight is rounded once, to the model's dtype
            place.module.weight_dtype = model.dtype
    load_adapter(model, adapter)
    report = merge(model, requantize=requantize)
    settle(model)
    if requantize:
        name = write_quantized(model, source, output, save_as, overwrite)
    else:
        make_dense(model)
        name = "dense"
        replace_folder(output, lambda folder: _save(model, source, folder), overwrite)
    return {
        "base": str(source),
        "adapter": str(adapter),
        "output": str(output),
        "save_as": name,
        "errors": report.errors,
        "folder_bytes": _folder_bytes(output),
        "seconds": time.perf_counter() - begin,
    }


def refuse_output(output: Path, overwrite: bool) -> None:
    """ConfigError before any work, where `replace_folder` would refuse after it."""
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not overwrite):
        got = f"{output}, a file" if output.is_file() else f"{output}, which is not empty"
        raise refuse(
            ConfigError, "output", got, "a new folder", "Choose another, or add --overwrite."
        )


def held_tokens(model: Any, source: Path, text: Iterable[str]) -> Tensor | None:
    """int64 [T] of the held-out text, None without one."""
    documents = [document for name in text for document in read(name)]
    if not documents:
        return None
    if model.config.is_encoder_decoder or not model.can_generate():
        advice = "Leave --text out for this kind of model."
        raise refuse(ConfigError, "--text", type(model).__name__, "a causal LM", advice)
    tokens = tokenize(documents, open_tokenizer(source))
    if tokens.numel() < 2:
        raise refuse(ConfigError, "--text", "no text", "at least 2 tokens", "Give a longer one.")
    return tokens


def write_quantized(model: Any, source: Path, output: Path, save_as: str, overwrite: bool) -> str:
    """Saves under the first of the wished names that can express the model; returns that name."""
    from ..hf.folder import SAVE_AS, copy_rest, save_quantized

    if save_as not in ("auto", *SAVE_AS):
        advice = "Choose one of these."
        raise refuse(ConfigError, "--save-as", repr(save_as), f"auto or {SAVE_AS}", advice)
    names = SAVE_AS if save_as == "auto" else (save_as,)
    for name in names:

        def fill(folder: Path, name: str = name) -> None:
            save_quantized(model, folder, name)
            copy_rest(source, folder)

        try:
            replace_folder(output, fill, overwrite)
            return name
        except FormatError:
            if name == names[-1]:
                raise
    raise AssertionError("unreachable")


def make_dense(model: Any) -> None:
    """Every quantised layer becomes the dense one of exactly its weight, in the class that the
    architecture has for it."""
    from ..hf.folder import dense_layer

    with torch.device("meta"):
        like = type(model)(model.config)
    for place in linear_places(model):
        twin, module = like.get_submodule(place.name), place.module
        if is_quantized(module):
            place.put(dense_layer(module, twin))
        elif is_conv1d(twin) and not is_conv1d(module):  # a merged layer of a quantised base
            twin.weight = nn.Parameter(module.weight.detach().t().contiguous())
            twin.bias = None if module.bias is None else nn.Parameter(module.bias.detach())
            place.put(twin)
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _save(model: Any, source: Path, folder: Path) -> None:
    from ..hf.folder import copy_rest

    left = [place.name for place in places(model) if is_quantized(place.module)]
    assert not left, left
    model.save_pretrained(folder)
    copy_rest(source, folder)


def _loss(model: Any, tokens: Tensor, seq_len: int, name: str, tell: Reporter) -> float:
    tell.phase(name, len(windows(tokens, seq_len)))
    loss, _ = heldout_loss(model, tokens, seq_len, lambda loss: tell.advance(1, loss=loss))
    return loss


def _layers(tell: Reporter) -> Any:
    def show(done: int, total: int, name: str) -> None:
        if done == 1:
            tell.phase("quantising", total)
        tell.advance(1)

    return show


def _facts(report: QuantizeReport, source: Path, output: Path) -> dict[str, Any]:
    return {
        "model": str(source),
        "output": str(output),
        "format": report.format,
        "errors": report.errors,
        "skipped": report.skipped,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "folder_bytes": _folder_bytes(output),
    }


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
