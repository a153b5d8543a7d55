"""A whole training step of a decoder with LoRA on all its linear layers: forward, backward, AdamW.

The model has the shape of a real one and random weights; every provider starts from the same ones,
so the first losses must agree before anything is timed. Steps of the providers take turns.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
from bench_qlinear import Options
from fastpeft.ops.launch import dependent_launch
from peers import Unavailable, import_bitsandbytes
from shapes import MODELS

PROVIDERS = ("fastpeft", "peft+bitsandbytes", "peft+bitsandbytes+liger", "peft")
LOSS_GAP = 0.03  # nats between the first losses of two providers: the same weights, other roundings


@dataclass(frozen=True)
class Step:
    """One problem."""

    model: str
    batch: int
    length: int
    R: int
    kind: str  # nf4, nf4-single, llm.int8 (threshold 6), dense
    dtype: str
    checkpointing: bool

    @property
    def note(self) -> str:
        """Starts with the words that scripts look for."""
        method = {"dense": "lora", "llm.int8": "int8"}.get(self.kind, "qlora")
        mode = "ckpt" if self.checkpointing else "budget" if method == "qlora" else "no ckpt"
        return f"{method} {mode} {self.model} {self.batch}x{self.length}"


def _base(step: Step, device: str) -> torch.nn.Module:
    """The decoder with random weights, the same at every call."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Unavailable(f"transformers does not import: {error}") from error
    shape = MODELS[step.model]
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(2048, step.length),
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, step.dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.config.use_cache = False
    return model.requires_grad_(False)


def _linears(model: torch.nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]


def _fastpeft(step: Step, model: torch.nn.Module) -> torch.nn.Module:
    import fastpeft

    if step.kind in ("nf4", "nf4-single"):
        fastpeft.quantize(model, "nf4", double_quant=step.kind == "nf4")
    elif step.kind == "llm.int8":
        fastpeft.quantize(model, "int8", threshold=6.0)
    config = fastpeft.LoRA(r=step.R, lora_alpha=2 * step.R, target_modules="all-linear")
    fastpeft.attach(model, config)
    return model


def _peft(step: Step, model: torch.nn.Module) -> torch.nn.Module:
    """peft's LoRA, over bitsandbytes' layers when the format is quantised."""
    try:
        import peft
    except ImportError as error:
        raise Unavailable(f"peft does not import: {error}") from error
    names = _linears(model)
    if step.kind != "dense":
        _to_bitsandbytes(step, model)
    config = peft.LoraConfig(
        r=step.R, lora_alpha=2 * step.R, target_modules=names, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def _liger(model: torch.nn.Module) -> dict[str, Any]:
    """Applies Liger's kernels to this model. It also replaces functions of transformers for the
    whole process: those are put back and returned, to be in force during this model's steps alone.
    """
    try:
        from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_llama
    except ImportError as error:
        raise Unavailable(f"liger_kernel does not import: {error}") from error
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    apply_liger_kernel_to_llama(model=model)
    changed = {k: v for k, v in vars(modeling_llama).items() if before.get(k) is not v}
    for name in changed:
        setattr(modeling_llama, name, before[name])
    return changed


@contextlib.contextmanager
def _in_force(functions: dict[str, Any]):
    """Sets names of transformers' Llama module for a while."""
    if not functions:
        yield
        return
    from transformers.models.llama import modeling_llama

    before = {name: getattr(modeling_llama, name) for name in functions}
    try:
        for name, value in functions.items():
            setattr(modeling_llama, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(modeling_llama, name, value)


def _to_bitsandbytes(step: Step, model: torch.nn.Module) -> None:
    bnb = import_bitsandbytes()
    for name in _linears(model):
        linear = model.get_submodule(name)
        N, K = linear.weight.shape
        device, dtype = linear.weight.device, linear.weight.dtype
        if step.kind == "llm.int8":
            new = bnb.nn.Linear8bitLt(
                K, N, False, has_fp16_weights=False, threshold=6.0, device="meta"
            )
            new.weight = bnb.nn.Int8Params(
                linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
            )
        else:
            double = step.kind == "nf4"
            new = bnb.nn.Linear4bit(K, N, False, dtype, double, "nf4", device="meta")
            new.weight = bnb.nn.Params4bit(
                linear.weight.data,
                requires_grad=False,
                compress_statistics=double,
                quant_type="nf4",
                module=new,
            )
        model.set_submodule(name, new.to(device))
    setattr(model, "is_loaded_in_8bit" if step.kind == "llm.int8" else "is_loaded_in_4bit", True)


def setup(step: Step, provider: str, device: str) -> Callable[[int], torch.Tensor]:
    """run(i): one step on batch i, returns the loss on the device.

    Raises:
        Unavailable: the provider cannot run it.
    """
    if step.kind not in ("nf4", "nf4-single", "llm.int8", "dense"):
        raise Unavailable(
            f"a training step is raced in nf4, nf4-single, llm.int8, dense: {step.kind}"
        )
    if provider == "peft" and step.kind != "dense":
        raise Unavailable("peft alone: dense weights", False)
    if provider.startswith("peft+bitsandbytes") and step.kind == "dense":
        raise Unavailable("a dense model has nothing of bitsandbytes", False)
    model = _base(step, device)
    patches = _liger(model) if provider.endswith("liger") else {}
    model = (_fastpeft if provider == "fastpeft" else _peft)(step, model)
    model.train()
    if step.checkpointing:
        _checkpoint(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=device == "cuda")
    draw = torch.Generator().manual_seed(1)
    size = (8, step.batch, step.length)
    batches = torch.randint(0, MODELS[step.model].vocab, size, generator=draw).to(device)

    # float32 factors under autocast, as the Trainer runs all of them
    def autocast():
        low = step.dtype != "float32"
        return torch.autocast(device, getattr(torch, step.dtype)) if low else _in_force({})

    def run(i: int) -> torch.Tensor:
        ids = batches[i % len(batches)]
        with _in_force(patches):
            with autocast():
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def _checkpoint(model: torch.nn.Module) -> None:
    """The name changes in transformers 6."""
    name = "activation_checkpointing_enable"
    if not hasattr(model, name):
        name = "gradient_checkpointing_enable"
    getattr(model, name)({"use_reentrant": False})


def _timed(run: Callable[[int], torch.Tensor], i: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(i)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _peak_mib(run, device: str, held: float) -> float | None:
    """Peak memory of one step in MiB, of this provider's model alone."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(1)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before + held) / 2**20


def run(steps: list[Step], options: Options) -> int:
    """Races until the list or the budget ends; how many problems were left out."""
    for number, step in enumerate(steps):
        if options.budget.spent():
            return len(steps) - number
        _race(step, options)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def _race(step: Step, options: Options) -> None:
    device, runs, peaks, losses = options.device, {}, {}, {}
    for provider in options.providers:
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        try:
            work = setup(step, provider, device)
        except Unavailable as reason:
            if reason.worth_telling:
                options.tell(f"{provider}: not raced: {reason}")
            continue
        held = (torch.cuda.memory_allocated() if device == "cuda" else 0) - before
        losses[provider] = float(work(0))
        peaks[provider] = _peak_mib(work, device, held)
        runs[provider] = work
    wrong = [p for p in losses if not abs(losses[p] - losses.get("fastpeft", losses[p])) < LOSS_GAP]
    if wrong:
        options.say(f"first losses differ, nothing timed: {losses}")
        return
    times: dict[str, list[float]] = {provider: [] for provider in runs}
    for turn in range(options.rounds):
        for provider in runs if turn % 2 else reversed(runs):
            times[provider].append(_timed(runs[provider], turn + 2, device))
        if options.budget.spent() and turn >= 2:
            break
    for provider, measured in times.items():
        ms, p20, p80 = harness.percentiles(measured)
        tokens = step.batch * step.length
        spread = f"{len(measured)} steps, p20 {p20:.4g}, p80 {p80:.4g} ms"
        options.writer.write(
            race=step.note,
            op="train_step",
            provider=provider,
            pdl=(provider == "fastpeft" and dependent_launch()) or None,
            direction="fwd+bwd",
            M=tokens,
            R=step.R,
            dtype=step.dtype,
            format={"dense": "bf16" if step.dtype == "bfloat16" else step.dtype}.get(
                step.kind, step.kind
            ),
            ms=ms,
            tokens_per_s=tokens / ms * 1e3,
            peak_mib=peaks[provider],
            note=f"{step.note}; {spread}; loss {losses[provider]:.4f}",
        )
