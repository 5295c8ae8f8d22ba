"""Stacked parameters: the weights of all layers of a kind in one tensor, in whose memory the
model's own parameters lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar
from weakref import WeakSet

import torch

from rmtcompile.binding.captured import Leaf
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.weights import Weight
from rmtcompile.runtime.gradients import Stacked, is_transformed
from rmtcompile.runtime.sharing import Sharing

_LARGE = 0.1
"""Share of all weights above which a stack is large."""

_SPARE = 0.2
"""Share of a device's free memory that a large stack may take before its parameters are moved into it."""


class Stack:
    """One stacked weight [layers, rows, ...]; leaf p of layer l is `tensor[l, start:stop]`, the same
    memory."""

    def __init__(self, weight: Weight, leaves: dict[str, Leaf], sharing: Sharing | None = None) -> None:
        self.weight = weight
        self.leaves = [[leaves[name] for name in parts] for parts in weight.leaves]
        self.tensor: torch.Tensor | None = None
        self.pointers: list[int] = []
        self.is_large = False
        self._sharing = sharing or Sharing()

    def holds(self, weight: Weight, leaves: dict[str, Leaf]) -> bool:
        """Whether this is the stack of these very parameters."""
        if weight != self.weight:
            return False
        mine = [leaf for parts in self.leaves for leaf in parts]
        theirs = [leaves[name] for parts in weight.leaves for name in parts]
        return all(
            a.holder is not None and a.holder is b.holder and a.key == b.key
            for a, b in zip(mine, theirs, strict=True)
        )

    def current(self) -> torch.Tensor:
        """The stack, made again where a parameter was replaced, moved or cast since."""
        tensors = [[leaf.fetch() for leaf in parts] for parts in self.leaves]
        flat = [tensor for parts in tensors for tensor in parts]
        has_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat)
        if has_gradients and (is_transformed() or not all(tensor.is_leaf for tensor in flat)):
            return together(tensors)
        if not self._is_made_of(flat):
            if self._stays(flat):
                return together(tensors)
            self._stack(tensors)
        assert self.tensor is not None
        if has_gradients:
            found: torch.Tensor = Stacked.apply(self.tensor, [len(parts) for parts in tensors], *flat)
            return found
        return self.tensor

    def _is_made_of(self, flat: Sequence[torch.Tensor]) -> bool:
        """Whether these lie in the stack."""
        pointers = [tensor.data_ptr() for tensor in flat]
        return self.tensor is not None and pointers == self.pointers and flat[0].dtype == self.tensor.dtype

    @property
    def stays(self) -> bool:
        """Whether the parameters stay where they are, and are put together at each call."""
        flat = [leaf.fetch() for parts in self.leaves for leaf in parts]
        return not self._is_made_of(flat) and self._stays(flat)

    def _stays(self, flat: Sequence[torch.Tensor]) -> bool:
        """Whether some share memory with each other or with more than themselves, which is to last."""
        stacks = {s.tensor.untyped_storage().data_ptr() for s in Stacks._alive if s.tensor is not None}
        return self._sharing.stays(flat, stacks, [leaf.name for parts in self.leaves for leaf in parts])

    def _stack(self, tensors: Sequence[Sequence[torch.Tensor]]) -> None:
        first = tensors[0]
        for layer, parts in enumerate(tensors):
            for i, tensor in enumerate(parts):
                if (tensor.shape, tensor.dtype, tensor.device) != (
                    first[i].shape,
                    first[i].dtype,
                    first[i].device,
                ):
                    raise UnsupportedError(
                        "parameters of one kind of layer differ in shape, dtype or device",
                        [
                            f"{leaf.name}: {tuple(value.shape)} {value.dtype} {value.device}"
                            for leaf, value in (
                                (self.leaves[0][i], first[i]),
                                (self.leaves[layer][i], tensor),
                            )
                        ],
                    )
        rows = sum(part.shape[0] if part.dim() else 1 for part in first)
        shape = (rows, *first[0].shape[1:]) if len(first) > 1 else first[0].shape
        # A parameter made in inference mode cannot become a view of memory that was not.
        made_there = any(part.is_inference() for parts in tensors for part in parts)
        self._sharing.tell_others([part for parts in tensors for part in parts], self.leaves[0][0].name)
        with torch.inference_mode(made_there), torch.no_grad():
            stack = self._room(tensors, (len(tensors), *shape))
            for layer, parts in enumerate(tensors):
                start = 0
                for tensor in parts:
                    view = stack[layer]
                    if len(parts) > 1:
                        view = view[start : start + tensor.shape[0]]
                        start += tensor.shape[0]
                    view.copy_(tensor)
                    tensor.data = _apart(view)
        self.tensor = stack
        self.pointers = [tensor.data_ptr() for parts in tensors for tensor in parts]

    def _room(self, tensors: Sequence[Sequence[torch.Tensor]], shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for the stack. A large one would hold a good part of the weights twice until they are moved:
        unless the device has plenty of room, the weights wait in the host's memory."""
        flat = [tensor for parts in tensors for tensor in parts]
        device, dtype = flat[0].device, flat[0].dtype
        if self.is_large and device.type != "cpu" and not _has_plenty(device, self.nbytes):
            for tensor in flat:
                tensor.data = tensor.data.cpu()
        try:
            return torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError:
            for tensor in flat:
                tensor.data = tensor.data.to(device)
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they were captured."""
        leaves = [leaf for parts in self.leaves for leaf in parts]
        return sum(leaf.tensor.numel() * leaf.tensor.element_size() for leaf in leaves)


def together(tensors: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """A new stack of what the layers have, of several parts each."""
    return torch.stack([parts[0] if len(parts) == 1 else torch.cat(list(parts)) for parts in tensors])


def _apart(view: torch.Tensor) -> torch.Tensor:
    """The same memory behind a storage of its own, so that parameters look like any others to what goes by
    storages: `torch.save`, safetensors, a copy. The view itself where DLPack lacks its type or device."""
    try:
        return torch.from_dlpack(view)
    except (RuntimeError, BufferError, TypeError, ValueError, AssertionError):
        return view


def _has_plenty(device: torch.device, nbytes: int) -> bool:
    """Whether so many bytes are a small part of what a device has free."""
    return device.type == "cuda" and nbytes < _SPARE * torch.cuda.mem_get_info(device)[0]


@dataclass(frozen=True)
class Alone:
    """A stack apart from its parameters: a leaf of autograd of its own.

    Attributes:
        stack: what it is of.
        tensor: [L, ...], the stack's memory, with gradients.
        ports: names under which it is read, as it is.
    """

    stack: Stack
    tensor: torch.Tensor
    ports: tuple[str, ...]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The parameters, layer by layer."""
        return [leaf.fetch() for parts in self.stack.leaves for leaf in parts]

    @property
    def parts(self) -> list[int]:
        """How many parameters each layer has."""
        return [len(parts) for parts in self.stack.leaves]


class Derived:
    """A stack whose leaves already live in other stacks: rows of one where they are evenly spaced there, else
    a copy a call."""

    def __init__(self, weight: Weight, leaves: dict[str, Leaf], owner: dict[str, Stack]) -> None:
        self.weight = weight
        self.leaves = [[leaves[name] for name in parts] for parts in weight.leaves]
        self.owners = [owner.get(parts[0]) for parts in weight.leaves]

    def current(self) -> torch.Tensor:
        """The stacked tensor for this call; it has to be read after its owners were checked."""
        tensors = [[leaf.fetch() for leaf in parts] for parts in self.leaves]
        views = [parts[0] for parts in tensors] if all(len(parts) == 1 for parts in tensors) else []
        gradients = torch.is_grad_enabled() and any(t.requires_grad for parts in tensors for t in parts)
        if views and not gradients and (found := self._rows(views)) is not None:
            return found
        return together(tensors)

    @property
    def has_gradients(self) -> bool:
        """Whether a leaf wants a gradient."""
        return any(leaf.fetch().requires_grad for parts in self.leaves for leaf in parts)

    def _rows(self, views: list[torch.Tensor]) -> torch.Tensor | None:
        owner = self.owners[0]
        if owner is None or owner.tensor is None or any(other is not owner for other in self.owners):
            return None
        base, first = owner.tensor, views[0]
        starts = [view.data_ptr() - base.data_ptr() for view in views]
        offsets = [start // base.element_size() for start in starts]
        step = offsets[1] - offsets[0] if len(offsets) > 1 else base.stride(0)
        same = first.dtype == base.dtype and all(0 <= start < base.nbytes for start in starts)
        even = all(b - a == step for a, b in pairwise(offsets))
        if not (same and even and step > 0):
            return None
        return base.as_strided((len(views), *first.shape), (step, *first.stride()), offsets[0])


class Gathered:
    """State that the forward replaces at each call, stacked anew for each run."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight

    def current(self, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The stacked tensor for this run."""
        parts = [[held[name] for name in names] for names in self.weight.leaves]
        return torch.stack([found[0] if len(found) == 1 else torch.cat(found) for found in parts])


class Stacks:
    """All stacked weights of a program. Each leaf lives in one stack; other stacks with it are rows of that
    one, or copies.

    Args:
        weights: by port name.
        leaves: the tensors they are made of, by name.
        replaced: leaves that the forward replaces by other tensors.
    """

    _alive: ClassVar[WeakSet[Stack]] = WeakSet()
    """Stacks of all programs; they are used again for the same parameters, so that programs of one model do
    not take the weights from each other."""

    def __init__(
        self,
        weights: dict[str, Weight],
        leaves: dict[str, Leaf],
        replaced: frozenset[str] = frozenset(),
    ) -> None:
        owner: dict[str, Stack] = {}
        sharing = Sharing()
        made: dict[Weight, Stack | Derived | Gathered] = {}
        self.dtypes = {name: weight.dtype for name, weight in weights.items() if weight.dtype is not None}
        weights = {name: replace(weight, dtype=None) for name, weight in weights.items()}
        widest_first = sorted(
            set(weights.values()), key=lambda w: (-len(w.leaves[0]), -len(w.leaves), w.leaves)
        )
        for weight in widest_first:
            names = [name for parts in weight.leaves for name in parts]
            if replaced.intersection(names):
                made[weight] = Gathered(weight)
            elif len(set(names)) == len(names) and not any(name in owner for name in names):
                alike = next((s for s in self._alive if s.holds(weight, leaves)), None)
                made[weight] = single = alike or Stack(weight, leaves, sharing)
                self._alive.add(single)
                owner.update(dict.fromkeys(names, single))
            else:
                made[weight] = Derived(weight, leaves, owner)
        self._in_order: list[Stack | Derived] = [s for s in made.values() if isinstance(s, Stack)]
        self._in_order += [s for s in made.values() if isinstance(s, Derived)]
        stacks = [s for s in made.values() if isinstance(s, Stack)]
        whole = sum(stack.nbytes for stack in stacks)
        for stack in stacks:
            stack.is_large = stack.nbytes > _LARGE * whole
        self.stacks = {name: made[weight] for name, weight in weights.items()}

    def leaves_of(self, name: str) -> tuple[tuple[str, ...], ...]:
        """The leaves of a stack, as in `Weight`; none where nothing is stacked under this name."""
        return self.stacks[name].weight.leaves if name in self.stacks else ()

    @property
    def can_be_alone(self) -> bool:
        """Whether stacks can be leaves of autograd in the place of their parameters: no weight is put
        together of parameters that live elsewhere."""
        return not any(
            stack.has_gradients if isinstance(stack, Derived) else stack.stays for stack in self._in_order
        )

    def alone(self) -> list[Alone]:
        """The stacks whose parameters want gradients, apart from them."""
        found = []
        for stack in self._in_order:
            leaves = [leaf.fetch() for parts in stack.leaves for leaf in parts]
            if isinstance(stack, Stack) and any(leaf.requires_grad for leaf in leaves):
                names = [name for name, other in self.stacks.items() if other is stack]
                with torch.no_grad():
                    tensor = stack.current().detach().requires_grad_()
                ports = tuple(name for name in names if name not in self.dtypes)
                found.append(Alone(stack, tensor, ports))
        return found

    def current(
        self, held: Mapping[str, torch.Tensor], alone: Sequence[Alone] = ()
    ) -> dict[str, torch.Tensor]:
        """Stacked tensors by port name, checked against the model's parameters.

        Args:
            held: what this run reads as the leaves that are replaced.
            alone: stacks that are read apart from their parameters.
        """
        found = {id(part.stack): part.tensor.view_as(part.tensor) for part in alone}
        for stack in self._in_order:
            if id(stack) not in found:
                found[id(stack)] = stack.current()
        values = {
            name: stack.current(held) if isinstance(stack, Gathered) else found[id(stack)]
            for name, stack in self.stacks.items()
        }
        converted: dict[tuple[int, torch.dtype], torch.Tensor] = {}  # by the stack
        for name, dtype in self.dtypes.items():
            key = (id(self.stacks[name]), dtype)
            if key not in converted:
                converted[key] = values[name].to(dtype)
            values[name] = converted[key]
        return values
