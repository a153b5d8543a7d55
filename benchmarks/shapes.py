"""Sizes to race: linear layers (N out features, K in features) and whole models. Others may be
given on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

# name -> (N, K) of its linear layers
LINEAR = {
    "llama3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama3-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "smollm2-135m": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
    "4096": ((4096, 4096),),
    "14336": ((14336, 4096),),
    "28672": ((28672, 8192),),
    "odd": ((1000, 1000), (4097, 4096), (11008, 4100)),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama kind."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


MODELS = {
    "tiny": ModelShape(64, 128, 2, 4, 2, 256, True),
    "smollm2-135m": ModelShape(576, 1536, 30, 9, 3, 49152, True),
    "llama3-8b": ModelShape(4096, 14336, 32, 32, 8, 128256, False),
}


def linear_shapes(text: str) -> list[tuple[int, int]]:
    """ "llama3-8b,576x1536" -> [(N, K), ...] without repeats; a name of LINEAR or NxK.

    Raises:
        ValueError: neither.
    """
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        if part in LINEAR:
            found += [shape for shape in LINEAR[part] if shape not in found]
            continue
        try:
            N, K = (int(side) for side in part.lower().split("x"))
        except ValueError:
            raise ValueError(
                f"shapes: got {part!r}, expected NxK or one of {', '.join(LINEAR)}"
            ) from None
        if (N, K) not in found:
            found.append((N, K))
    return found
