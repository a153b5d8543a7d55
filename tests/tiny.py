"""Small real architectures with random weights, and what several tests ask of them."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()
VOCABULARY, HIDDEN = 128, 64


@pytest.fixture(autouse=True)
def one_thread():
    """Import it into a test file: for models this small a second thread only waits (6 times slower
    on a busy machine)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(layers: int = 2, tied: bool = False, hidden: int = HIDDEN) -> nn.Module:
    """Grouped-query attention, no biases."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    return _seeded(transformers.LlamaForCausalLM, config)


def qwen2() -> nn.Module:
    """Biases on q, k and v; tied embeddings."""
    config = transformers.Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    return _seeded(transformers.Qwen2ForCausalLM, config)


def gpt2() -> nn.Module:
    """Conv1D instead of nn.Linear, biases everywhere, tied embeddings."""
    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64
    )
    return _seeded(transformers.GPT2LMHeadModel, config)


def mixtral() -> nn.Module:
    """Expert weights as 3-D parameters."""
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    return _seeded(transformers.MixtralForCausalLM, config)


MODELS = {
    "llama": llama,
    "llama-tied": functools.partial(llama, tied=True),
    "gpt2": gpt2,
    "qwen2": qwen2,
}


def _seeded(kind, config) -> nn.Module:
    torch.manual_seed(7)
    model = kind(config)
    for name, parameter in model.named_parameters():  # biases start as zero and would prove nothing
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tokens(batch: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    """int64 [batch, length]."""
    return torch.randint(
        0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """[2, 9, VOCABULARY] for tokens()."""
    return model(tokens()).logits


def loss(model: nn.Module) -> torch.Tensor:
    """The model's own loss on tokens()."""
    return model(tokens(), labels=tokens()).loss


@torch.no_grad()
def shake(parameters, std: float = 0.3, seed: int = 5) -> None:
    """Give every parameter random values, so that an adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def fingerprint(model: nn.Module) -> dict[str, tuple[int, bool, torch.Tensor]]:
    """{parameter or buffer: (identity of the owning module, requires_grad, copy of the values)}."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found[f"{path}.{key}"] = (id(module), tensor.requires_grad, tensor.detach().clone())
    return found


def assert_same(before, after) -> None:
    """Two fingerprints: same names in the same order, same modules, same flags, same bits."""
    assert list(before) == list(after)
    for name, (module, flag, values) in before.items():
        other, other_flag, other_values = after[name]
        assert module == other, f"{name}: another module object"
        assert flag == other_flag, f"{name}: requires_grad {other_flag}, was {flag}"
        assert values.dtype == other_values.dtype and torch.equal(values, other_values), name


def checkpoint_activations(model: nn.Module, reentrant: bool) -> None:
    """Gradient checkpointing, by the name that this transformers has for it."""
    old = getattr(model, "gradient_checkpointing_enable", None)
    enable = getattr(model, "activation_checkpointing_enable", old)
    enable({"use_reentrant": reentrant})
