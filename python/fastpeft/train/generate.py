"""Text out of a model: a prompt, continued."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    chat: bool = False,
    seed: int = 0,
) -> str:
    """What the model writes after a prompt.

    Args:
        model, tokenizer: of transformers.
        prompt: not empty.
        max_new_tokens: length of the answer, in tokens; it may end earlier.
        temperature: 0: the likeliest token each time.
        chat: put the prompt as a user's message into the tokenizer's chat template.
        seed: of the sampling.

    Returns:
        The new text alone.

    Raises:
        ConfigError: an empty prompt.
    """
    if not prompt.strip():
        raise refuse(ConfigError, "prompt", "nothing", "a text to continue", "Add --prompt TEXT.")
    device = next(model.parameters()).device
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = prompt
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
        **(sampling or {"do_sample": False}),
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
