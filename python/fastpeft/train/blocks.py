"""Documents -> tokens -> blocks of one length, in an order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError, refuse
from .sources import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All documents in one row, an end-of-text token after each.

    Args:
        documents: texts, or chats for the tokenizer's chat template.
        tokenizer: of transformers.

    Returns:
        int64 [T].

    Raises:
        ConfigError: a chat, and the tokenizer has no template.
    """
    ids: list[int] = []
    for document in documents:
        if document.messages is not None:
            if not getattr(tokenizer, "chat_template", None):
                raise refuse(
                    ConfigError,
                    "data",
                    "chat messages",
                    "plain text, as this tokenizer has no chat template",
                    'Turn the rows into {"text": ...}, or use an instruct model.',
                )
            text = tokenizer.apply_chat_template(document.messages, tokenize=False)
        else:
            text = document.text or ""
        # verbose=False: no warning about texts beyond the model's length; they are cut later.
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.long)


def cut(tokens: Tensor, seq_len: int) -> Tensor:
    """Packs tokens [T] into whole blocks [B, seq_len]; the rest that fills no block is left out.

    Raises:
        ConfigError: not one whole block.
    """
    count = tokens.numel() // seq_len
    if count == 0:
        raise refuse(
            ConfigError,
            "data",
            f"{tokens.numel()} tokens",
            f"at least one block of {seq_len}",
            "Give more text, or a smaller --seq-len.",
        )
    return tokens[: count * seq_len].view(count, seq_len)


def hold_out(blocks: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Blocks [B, L] -> training blocks, and the last `fraction` of the text as tokens [T].

    Raises:
        ConfigError: fewer than two blocks.
    """
    kept = max(1, round(blocks.shape[0] * fraction))
    if blocks.shape[0] < 2:
        raise refuse(
            ConfigError,
            "data",
            "one block",
            "two: one to train on, one to hold out",
            "Give more text, a smaller --seq-len, or a --heldout source.",
        )
    return blocks[:-kept], blocks[-kept:].reshape(-1)


class BlockSequence(Dataset):
    """The whole run's samples in their final order: epoch after epoch, each a permutation.

    Made once from the seed, so that a resumed run continues in the middle of the same sequence
    without any sampler state.

    Args:
        blocks: int64 [B, L].
        count: samples of the whole run: steps * batch * accumulation.
        seed: of the permutations.
    """

    def __init__(self, blocks: Tensor, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-count // blocks.shape[0])
        order = [torch.randperm(blocks.shape[0], generator=generator) for _ in range(epochs)]
        self.blocks = blocks
        self.order = torch.cat(order)[:count]

    def __len__(self) -> int:
        return self.order.numel()

    def __getitem__(self, index: int) -> dict[str, Any]:
        block = self.blocks[self.order[index]]
        return {"input_ids": block, "labels": block}
