"""summary and memory: how much trains, and what the bytes are spent on. Values that print as
tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from fastpeft.attach import adapter_parameters, state_of
from fastpeft.patterns import is_quantized, places

KINDS = ("packed codes", "scales", "dense", "adapters", "other")


@dataclass
class AdapterRow:
    """One adapter: name, method, number of parameters, bytes, whether active and whether it may
    train.
    """

    name: str
    method: str
    parameters: int
    bytes: int
    active: bool
    trainable: bool


@dataclass
class Summary:
    """Counts of parameters; a quantised weight [N, K] counts N * K, a shared one once.

    total: base and adapters. trainable: those with requires_grad. merged: the adapter in the base
    weights, or None.
    """

    total: int
    trainable: int
    adapters: list[AdapterRow] = field(default_factory=list)
    merged: str | None = None

    @property
    def share(self) -> float:
        """trainable / total, 0 for an empty model."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [
            ("parameters", f"{self.total:,}"),
            ("trainable", f"{self.trainable:,} ({100 * self.share:.3f} %)"),
        ]
        for row in self.adapters:
            flags = [w for w, on in (("active", row.active), ("frozen", not row.trainable)) if on]
            if row.name == self.merged:
                flags.append("merged")
            rows.append(
                (
                    f"adapter {row.name}",
                    f"{row.method}, {row.parameters:,}" + "".join(f", {w}" for w in flags),
                )
            )
        return table(rows)


class MemoryTable(dict[str, int]):
    """{kind: bytes} for the kinds of KINDS; `total` is their sum; prints as a table."""

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.values())

    def __str__(self) -> str:
        rows = [(kind, f"{size:,} bytes") for kind, size in self.items()]
        return table([*rows, ("total", f"{self.total:,} bytes")])


def summary(model: nn.Module) -> Summary:
    """How many parameters there are, how many train, and one row an adapter."""
    total = trainable = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    for place in places(model):
        if is_quantized(place.module):
            total += place.module.in_features * place.module.out_features
    state = state_of(model)
    if state is None:
        return Summary(total, trainable)
    rows = []
    for name, attached in state.adapters.items():
        parameters = adapter_parameters(model, name).values()
        count, size = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
        rows.append(
            AdapterRow(name, attached.method, count, size, name in state.active, attached.trainable)
        )
    return Summary(total, trainable, rows, state.merged)


def memory(model: nn.Module) -> MemoryTable:
    """Bytes of all parameters and buffers by kind; memory that is shared counts once, for the first
    kind that fits.

    packed codes: codes of quantised layers. scales: their scales, in float32 or quantised.
    adapters: all that adapters added. dense: the other parameters. other: the other buffers, and
    what a merged model keeps of its base.
    """
    found = MemoryTable(dict.fromkeys(KINDS, 0))
    seen: set[int] = set()
    packed: list[Tensor] = []
    scales: list[Tensor] = []
    for place in places(model):
        if is_quantized(place.module):
            for key, buffer in place.module.named_buffers(recurse=False):
                (packed if key == "codes" else scales).append(buffer)
    state = state_of(model)
    added = [
        p
        for name in (state.adapters if state else ())
        for p in adapter_parameters(model, name).values()
    ]
    # "dense" before "other", after "adapters": adapters are parameters too
    for kind, tensors in (
        ("packed codes", packed),
        ("scales", scales),
        ("adapters", added),
        ("dense", model.parameters()),
        ("other", _others(model)),
    ):
        found[kind] = _bytes(tensors, seen)
    return found


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared memory counted once."""
    return _bytes(_all_tensors(model), set())


def missing_gradients(model: nn.Module) -> list[str]:
    """Names of trainable parameters without a gradient: after a backward pass there should be none.

    A common cause: reentrant checkpointing below frozen embeddings that `attach` could not find.
    """
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns."""
    rows = list(rows)
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(f"{left:<{width}}  {right}" for left, right in rows)


def _others(model: nn.Module) -> Iterator[Tensor]:
    """Buffers, and what merged layers keep for `unmerge` outside the module tree."""
    yield from model.buffers()
    for module in model.modules():
        for kept in getattr(module, "_kept", ()):
            yield from kept.parameters()
            yield from kept.buffers()


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the tensors whose memory is not in `seen`, which grows."""
    total = 0
    for tensor in tensors:
        key = id(tensor) if tensor.is_meta else (tensor.data_ptr() or id(tensor))
        if key not in seen:
            seen.add(key)
            total += tensor.nbytes
    return total
