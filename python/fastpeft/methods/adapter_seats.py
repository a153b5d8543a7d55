"""What stands in a layer for a bottleneck adapter: three modules, each around one of the layer's.

    StreamTap around Site.stream   keeps the layer's residual stream r
    Adapted   around Site.tap      replaces the sub-layer's output h; owns the adapters
    NormSeat  around Site.norm     replaces the output of the norm after the sum, where asked to

They are transparent to everything else (a missing attribute is looked up in what they wrap), sit
outside any other wrapper, and share a `Box`. Nothing is kept from one forward pass to the next.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import StateError, refuse
from ..patterns import Place, places
from .adapter_sites import Layer, Site
from .rows import Rows


class Box:
    """What the seats of one site hand to each other within a forward pass.

    stream: r, [..., K], once StreamTap has seen it.
    wants_stream: whether an active adapter reads it.
    result: what NormSeat is to return instead of the norm's output.
    norm: the module of Site.norm or None; not a child of any seat.
    """

    def __init__(self, norm: nn.Module | None = None) -> None:
        self.stream: Tensor | None = None
        self.wants_stream = False
        self.result: Tensor | None = None
        self.norm = norm

    def take_stream(self) -> Tensor | None:
        """r, which is forgotten."""
        stream, self.stream = self.stream, None
        return stream

    def take_result(self) -> Tensor | None:
        """The replacement, which is forgotten."""
        result, self.result = self.result, None
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stream": None, "result": None}  # no activations in copies


class _Around(nn.Module):
    """A module that stands in another one's place and is, but for `forward`, like it."""

    fastpeft_wraps = "wrapped"

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.training = wrapped.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            if "wrapped" not in modules:
                raise  # half built: by copy or unpickling
            return getattr(modules["wrapped"], name)


class StreamTap(_Around):
    """Keeps the first input of a module for the boxes that want it."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__(wrapped)
        self.boxes: list[Box] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        for box in self.boxes:
            if box.wants_stream:
                box.stream = args[0] if args else kwargs["hidden_states"]
        return self.wrapped(*args, **kwargs)


class NormSeat(_Around):
    """Returns the box's result, if there is one, instead of the norm's output."""

    def __init__(self, wrapped: nn.Module, box: Box) -> None:
        super().__init__(wrapped)
        self.box = box

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., K]."""
        result = self.box.take_result()
        return self.wrapped(x) if result is None else result


class Adapted(_Around):
    """A sub-layer with bottleneck adapters behind it. Without an active one it is the sub-layer,
    bit for bit.

    Args:
        wrapped: module of Site.tap.
        box: shared with the other seats of the site.
        key: what the `adapters` library calls the place in this model.
        ends_in_norm: the model's norm follows the sum (post-norm).

    Attributes:
        adapters: {name: BottleneckAdapter}, applied in the order they are activated.
    """

    def __init__(self, wrapped: nn.Module, box: Box, key: str, ends_in_norm: bool) -> None:
        super().__init__(wrapped)
        self.adapters = nn.ModuleDict()
        self.box = box
        self.key = key
        self.ends_in_norm = ends_in_norm
        self.active: tuple[str, ...] = ()
        self.rows: Rows | None = None  # inside fastpeft.adapter_ids

    def set_active(self, names: tuple[str, ...]) -> None:
        """Which adapters of those here take part, in this order."""
        self.active = names
        chosen = [self.adapters[name] for name in names]
        keeps_sum = not chosen or chosen[-1].config.original_ln_after or self.ends_in_norm
        self.box.wants_stream = not keeps_sum or any(a.reads_stream for a in chosen)

    def set_rows(self, rows: Rows | None) -> None:
        """Which of them take part by row of the batch, beside none that is active; None ends that.

        Raises:
            StateError: one of them replaces the norm behind the sum, which is for all rows.
        """
        chosen = [(n, a) for n, a in self.adapters.items() if rows is not None and n in rows.names]
        for name, adapter in chosen:
            if self.ends_in_norm and not adapter.config.original_ln_after:
                raise refuse(
                    StateError,
                    f"adapter '{name}' in adapter_ids",
                    "original_ln_after=False, which leaves out the model's norm for a whole batch",
                    "an adapter that keeps it",
                    f"Run its rows alone, with activate(model, '{name}').",
                )
        self.rows = rows
        if rows is not None:
            self.box.wants_stream = any(
                a.reads_stream or not a.config.original_ln_after for _, a in chosen
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the sub-layer returns, with h [..., K] replaced."""
        output = self.wrapped(*args, **kwargs)
        if not self.active and self.rows is None:
            return output
        if isinstance(output, tuple):
            return (self._adapt(output[0]), *output[1:])
        return self._adapt(output)

    def _adapt(self, h: Tensor) -> Tensor:
        stream = self.box.take_stream()
        if self.rows is None:
            return self._through(self.active, h, stream)
        y = h
        for name, index in self.rows.groups(self.adapters, h):
            if index is None:
                return self._through((name,), h, stream)
            beside = None if stream is None else stream.index_select(0, index)
            own = self._through((name,), h.index_select(0, index), beside)
            y = y.index_copy(0, index, own)
        return y

    def _through(self, names: tuple[str, ...], h: Tensor, stream: Tensor | None) -> Tensor:
        """h after these adapters."""
        out = h
        for name in names:
            out = self.adapters[name].step(out, stream, self.box.norm)
        if self.adapters[names[-1]].config.original_ln_after:
            return out.to(h.dtype)
        if self.ends_in_norm:  # neither sum nor norm: the norm's seat says so
            self.box.result = out.to(h.dtype)
            return h
        return (out - stream).to(h.dtype)  # the model adds the stream again


def seat_at(place: Place, kind: type[nn.Module]) -> Any:
    """The seat of class `kind` around the module of `place`, or None."""
    for seat in _chain(place):
        if isinstance(seat, kind):
            return seat
    return None


def adapted(model: nn.Module, name: str | None = None) -> list[tuple[Place, Adapted]]:
    """The sites with adapters, or those with adapter `name`, in model order."""
    found = [(place, place.wrapper(Adapted)) for place in places(model)]
    return [(p, s) for p, s in found if s is not None and (name is None or name in s.adapters)]


def take_seats(layer: Layer, site: Site, norm: nn.Module | None) -> Adapted:
    """The Adapted of a site; it and its companions are made if they are not there.

    norm: what adapters apply as the model's norm; None for none.
    """
    seat = seat_at(layer.modules[site.tap], Adapted)
    if seat is not None:
        return seat
    box = Box(norm)
    ends_in_norm = site.norm is not None and not layer.row.sandwich
    if ends_in_norm:
        box.norm = _put(layer.modules[site.norm], lambda inner: NormSeat(inner, box))
    tap = seat_at(layer.modules[site.stream], StreamTap)
    if tap is None:
        tap = _put(layer.modules[site.stream], StreamTap)
    tap.boxes.append(box)
    key = f"{layer.name}.{site.key}"
    return _put(layer.modules[site.tap], lambda inner: Adapted(inner, box, key, ends_in_norm))


def leave_seats(model: nn.Module) -> None:
    """Take out the seats of every site that has no adapter left: the layers are as before."""
    live = {id(seat.box) for _, seat in adapted(model) if seat.adapters}
    for place in list(places(model)):
        for seat in _chain(place):
            if isinstance(seat, StreamTap):
                seat.boxes = [box for box in seat.boxes if id(box) in live]
                if not seat.boxes:
                    _take_out(place, seat)
            elif isinstance(seat, (NormSeat, Adapted)) and id(seat.box) not in live:
                _take_out(place, seat)


def _chain(place: Place) -> list[nn.Module]:
    """The wrappers around a module as they are now, the outermost first."""
    parent, attribute, _ = place.chain[0]
    found: list[nn.Module] = []
    module = parent._modules[attribute]
    while module is not place.module:
        found.append(module)
        module = module._modules[type(module).fastpeft_wraps]
    return found


def _put(place: Place, make: Any) -> Any:
    """Set make(what is there) in the place, outside everything that is around the module."""
    parent, attribute, _ = place.chain[0]
    seat = make(parent._modules[attribute])
    setattr(parent, attribute, seat)
    return seat


def _take_out(place: Place, seat: nn.Module) -> None:
    parent, attribute, _ = place.chain[0]
    while parent._modules[attribute] is not seat:
        parent = parent._modules[attribute]
        attribute = type(parent).fastpeft_wraps
    setattr(parent, attribute, seat.wrapped)
