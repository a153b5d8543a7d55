"""Models for the tests of bottleneck adapters: those of the fixtures, and tiny ones by config."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import fastpeft
import tiny
import torch
import transformers
from fastpeft.attach import adapter_parameters
from safetensors.torch import load_file
from torch import nn

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FOLDER = Path(__file__).parent / "fixtures" / "bottleneck"
CASES = sorted(path.name for path in FOLDER.iterdir() if not path.name.endswith("-base"))
VOCAB = 40

_DECODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=32,
)
_ENCODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
)
_BOTH = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=32,
)
_OPT = dict(
    vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, max_position_embeddings=32
)
_OPT["num_attention_heads"] = 4

# name -> (model class, config class, values). No checkpoint is needed to see where the sums are.
BY_CONFIG = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(_DECODER, num_local_experts=4)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(_DECODER, head_dim=8)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", dict(_DECODER, head_dim=8)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", dict(_DECODER, head_dim=8)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(_DECODER, head_dim=8)),
    "phi": ("PhiForCausalLM", "PhiConfig", dict(_DECODER, num_key_value_heads=4)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "cohere": ("CohereForCausalLM", "CohereConfig", _DECODER),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "opt-post": ("OPTForCausalLM", "OPTConfig", dict(_OPT, do_layer_norm_before=False)),
    "bert": ("BertForMaskedLM", "BertConfig", _ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _ENCODER),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", dict(_ENCODER, embedding_size=32)),
    "deberta": ("DebertaV2ForMaskedLM", "DebertaV2Config", _ENCODER),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        dict(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BOTH),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BOTH),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _BOTH),
    "marian": ("MarianMTModel", "MarianConfig", dict(_BOTH, pad_token_id=1)),
}


def by_config(name: str) -> nn.Module:
    """A tiny random model that is in no fixture's files; norms and biases are random too."""
    model_class, config_class, values = BY_CONFIG[name]
    tokens = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    config = getattr(transformers, config_class)(**{**tokens, **values})
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def read_case(case: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(adapter_config.json, the adapter's tensors, inputs and logits) of a fixture."""
    folder = FOLDER / case
    raw = json.loads((folder / "adapter_config.json").read_text())
    return (
        raw,
        load_file(folder / "adapter.safetensors"),
        load_file(folder / "expected.safetensors"),
    )


def base_of(case: str) -> nn.Module:
    """The fixture's base model in float32, with the attention its logits were made with."""
    arch = case.split("-")[0]
    kind = getattr(transformers, read_case(case)[0]["model_class"])
    return kind.from_pretrained(
        FOLDER / f"{arch}-base", dtype=torch.float32, attn_implementation="eager"
    ).eval()


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two rows of tokens, the second padded at its end; decoder tokens where there is a decoder."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCAB, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 1, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(4, VOCAB, (2, 5), generator=generator)
    return inputs


def logits(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """[2, T, vocab]."""
    with torch.no_grad():
        return model(**(inputs_of(model) if inputs is None else inputs)).logits


def loss(model: nn.Module) -> torch.Tensor:
    """The model's own loss for fixed labels."""
    inputs = inputs_of(model)
    labels = inputs.pop("decoder_input_ids", inputs["input_ids"])
    return model(**inputs, labels=labels).loss


def rounding(expected: torch.Tensor) -> float:
    """What some hundred float32 roundings in another order may come to: 4e-6 of the largest."""
    return 4e-6 * expected.abs().max().item()


def build(arch: str, format: str | None = None) -> nn.Module:
    model = by_config(arch)
    if format:  # T5 reads wo.weight itself, which a quantised layer has not
        fastpeft.quantize(model, format, threshold=None, skip=("lm_head", "wo"))
    return model


def shaken(model: nn.Module, config: fastpeft.Bottleneck, name: str = "a") -> nn.Module:
    fastpeft.attach(model, config, name)
    tiny.shake(adapter_parameters(model, name).values())
    return model
