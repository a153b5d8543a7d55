"""Tiny models and folders for the tests of the transformers and bitsandbytes bridges."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers
from fastpeft.quant.frozen import QuantizedLinear

transformers.logging.disable_progress_bar()
VOCABULARY, HIDDEN = tiny.VOCABULARY, tiny.HIDDEN


def llama():
    """As tiny.llama, with sizes that bitsandbytes' CPU kernel can do (multiples of 64)."""
    config = tiny.llama().config
    config.intermediate_size = 128
    return tiny._seeded(transformers.LlamaForCausalLM, config)


def bert():
    config = transformers.BertConfig(
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        num_labels=3,
    )
    return tiny._seeded(transformers.BertForSequenceClassification, config)


def t5():
    config = transformers.T5Config(
        d_model=HIDDEN,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    return tiny._seeded(transformers.T5ForConditionalGeneration, config)


MODELS = {"llama": llama, "gpt2": tiny.gpt2, "bert": bert, "t5": t5, "tied": tiny.MODELS["qwen2"]}
FORMATS = [
    ("nf4", {}),
    ("nf4", {"blocksize": 32, "double_quant": False}),
    ("int8", {"threshold": 0.0}),
    ("int8", {"threshold": None}),
]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = tiny.tokens()
    extra = {"labels": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **extra).logits


@pytest.fixture(scope="module", name="dense")
def dense_folders(tmp_path_factory):
    """dense("gpt2"): the folder of that model in float32."""
    root, made = tmp_path_factory.mktemp("dense"), {}

    def folder(name: str) -> Path:
        if name not in made:
            MODELS[name]().save_pretrained(root / name)
            made[name] = root / name
        return made[name]

    return folder


def layers(model) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def same_bytes(first, second) -> None:
    """Equal state dicts, to the bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
