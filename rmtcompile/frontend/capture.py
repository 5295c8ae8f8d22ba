"""Capture: any callable on tensors -> one flat, functional FX graph, and what is needed to stand in for the
callable.

    forward(ids):                       placeholder ids
      for s in segments:                get_attr embed                 scope ()
        h = embed(ids[s])         ->    aten.embedding(embed, slice)   scope ()
        for layer in layers:            aten.linear(h, w_0)            scope (layers.0 #0,)
          h = layer(h)                  aten.linear(h, w_1)            scope (layers.1 #0,)

The forward runs once on fake tensors under `make_fx(pre_dispatch=True)`, so operations such as `linear`,
`einsum` and `scaled_dot_product_attention` stay whole, Python control flow disappears, and no memory is used
beyond the weights. Where it takes gradients itself, or uses other transforms of `torch.func` (a memory that
is updated by an inner gradient), it is traced once more below autograd, where `linear` is what it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from rmtcompile.binding.arguments import left_alone
from rmtcompile.binding.captured import Capture, Effect, Leaf, Out
from rmtcompile.binding.guard import ReadTracker
from rmtcompile.binding.kinds import held_oddly, is_plain, kind_name
from rmtcompile.binding.objects import contains_tensor
from rmtcompile.binding.state import Contents, Held, Snapshot, hooked_around, roots_of
from rmtcompile.binding.surroundings import Surroundings
from rmtcompile.binding.trees import Flattener, Kept
from rmtcompile.binding.watch import ModuleGuard
from rmtcompile.errors import CaptureError, UnsupportedError
from rmtcompile.frontend.asking import watching
from rmtcompile.frontend.blame import refusal
from rmtcompile.frontend.counting import Counts, note, plain
from rmtcompile.frontend.known import NUMBERS, Known, Reads
from rmtcompile.frontend.layouts import Layouts
from rmtcompile.frontend.masks import Masks
from rmtcompile.frontend.recorder import Recorder
from rmtcompile.frontend.repeated import Repeated
from rmtcompile.frontend.tracing import (
    SharedData,
    as_written,
    fake_like,
    refused_draws,
    refused_functions,
    saved_in_their_way,
    uncompiled_callables,
)
from rmtcompile.ir.modes import lazy_code, uncached_autocast
from rmtcompile.passes.flat.attention import attention
from rmtcompile.passes.flat.autocast import explicit_autocast

_SET_GRAD = torch._C._set_grad_enabled
_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast


class _BelowError(Exception):
    """Above autograd this forward cannot be traced: it takes gradients itself."""


def capture(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """Trace `fn(*args, **kwargs)` on fake tensors; the modules it runs are left as they were, also when
    tracing fails.

    Args:
        fn: a module or any callable on tensors. Not modified.
        args, kwargs: example inputs; tensors may be real or meta-like, only shape, dtype and device are read.

    Raises:
        CaptureError: the forward branches on values, or uses what cannot be traced; the message names the
            user's line.
    """
    counts = Counts()
    try:
        return _captured_above_or_below(fn, args, kwargs, counts)
    except UnsupportedError:
        if not counts:
            raise
    captured = _captured_above_or_below(fn, args, kwargs, None)
    counts.break_all()  # the forward minds that they are watched
    return captured


def _captured_above_or_below(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], counts: Counts | None
) -> Capture:
    try:
        return _captured(fn, args, kwargs, True, counts)
    except _BelowError:
        captured = _captured(fn, args, kwargs, False, counts)
    captured.module = attention(captured.module)
    return captured


def _captured(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    whole: bool,
    counts: Counts | None,
) -> Capture:
    """See `capture`.

    Args:
        whole: trace above autograd and transforms, where operations are whole.
        counts: notes what is made of integers that the forward counts on; None: they are not watched.
    """
    roots = roots_of(fn)
    names: dict[int, str] = {}
    for name, root in roots.items():
        for path, child in root.named_modules(remove_duplicate=False):
            names.setdefault(id(child), f"{name}.{path}" if name and path else name or path)
    _refuse_backward_hooks(fn, roots)
    snapshot = Snapshot(roots)
    recorder = Recorder(names, snapshot, whole)
    flat, in_spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
    produced: dict[str, Any] = {}

    def traced(*tensors: torch.Tensor) -> list[torch.Tensor]:
        tracing = proxy_tensor.get_proxy_mode()
        assert tracing is not None
        recorder.label_nodes(tracing.tracer, mode)
        if whole:
            Repeated(tracing, mode, known, recorder.takes_gradients)
        values = list(flat)
        for position, tensor in zip(positions, tensors, strict=True):
            values[position] = tensor
        call_args, call_kwargs = pytree.tree_unflatten(values, in_spec)
        modules = chain.from_iterable(root.modules() for root in roots.values())
        watched = watching(counts, modules) if counts is not None else nullcontext()
        with left_alone(fn, call_args, call_kwargs), watched:
            result = fn(*call_args, **call_kwargs)
        outputs: list[torch.Tensor] = []
        result_leaves, result_spec = pytree.tree_flatten(result)
        result_leaves = [plain(leaf) for leaf in result_leaves]
        _refuse_objects(result_leaves)
        produced["result"] = (_refer(result_leaves, outputs), result_spec)
        produced["effects"] = list(_effects(snapshot, tracker.written, outputs))
        masks.refuse_left(outputs)
        return outputs

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [fake_like(mode, flat[i]) for i in positions]
    trace = proxy_tensor.make_fx(
        traced, tracing_mode="fake", pre_dispatch=whole, _allow_non_fake_inputs=True,
        _disable_torch_fn_metadata_mode=True,
    )  # fmt: skip
    grad = torch.is_grad_enabled()
    tracker, known, masks, layouts = ReadTracker(), Known(), Masks(), Layouts()
    checkpoints: list[str] = []
    contents, around, shared = Contents(snapshot), Surroundings(fn, roots), SharedData()
    try:
        with (
            recorder.watching(),
            tracker.watching(roots),
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
            uncached_autocast(),
            shared,
            Reads(known),
            known,
            lazy_code(),
            as_written(),
            uncompiled_callables(),
            refused_functions(checkpoints),
            refused_draws(),
            saved_in_their_way(checkpoints) as ignored,
            masks,
            layouts,
        ):
            module = trace(*fakes)
        shared.refuse_swallowed()
        known.refuse_swallowed()
    except CaptureError:
        raise
    except Exception as error:
        if whole and recorder.transforms:
            raise _BelowError from error
        raise refusal(error, held_oddly(fn)) from None  # its trace is that of fake tensors
    finally:
        snapshot.restore()
        known.restore()
        lost, outside = contents.restore(), [*around.restore(), *tracker.outside]
    if whole and recorder.transforms:
        raise _BelowError
    if outside:
        raise CaptureError(
            "the forward keeps state outside of its modules",
            outside,
            "keep it in an attribute of an nn.Module, or pass it in and return it",
        )
    if lost:
        raise CaptureError(
            "the forward writes into a parameter",
            lost,
            "run the model once before optimizing it if this happens on the first call only",
        )
    roots = {**roots, **recorder.roots}
    _drop_reads(module.graph)
    _name_contexts(module.graph)
    owners: dict[int, list[Held]] = {}
    for held in snapshot.tensors():
        owners.setdefault(id(held.tensor), []).append(held)
    leaves = _leaves(module, owners, whole)
    changes = [effect.change for effect in produced["effects"] if effect.change is not None]
    changed = frozenset((id(change.record.target), change.step[1]) for change in changes)
    left = [leaf for effect in produced["effects"] for leaf in effect.leaves]
    kept = frozenset(id(leaf.value) for leaf in left if isinstance(leaf, Kept) and leaf.is_exact)
    sums = counts.sums if counts is not None else frozenset()
    guard = ModuleGuard(snapshot, tracker.reads | recorder.unseen, roots, changed, around, kept, sums)
    for owner, name in guard.number_places():
        note(owner, name)
    module = explicit_autocast(module)
    read = [_leaf(tensor, f"read{i}", owners) for i, tensor in enumerate(known.read)]
    return Capture(
        module, leaves, recorder.calls, produced["result"], produced["effects"], roots, guard, read,
        checkpoints[0] if checkpoints else "", tuple(ignored), layouts.shown(),
    )  # fmt: skip


def _refuse_backward_hooks(fn: Callable[..., Any], roots: dict[str, nn.Module]) -> None:
    """A compiled program has no modules around which such hooks could run."""
    if not torch.is_grad_enabled():
        return
    hooked = [
        f"{name}.{path}".strip(".") or type(module).__name__
        for name, root in roots.items()
        for path, module in root.named_modules()
        if (module._backward_hooks or module._backward_pre_hooks) and module is not hooked_around(fn)
    ]
    if hooked:
        raise CaptureError(
            "a module has backward hooks, which a compiled program would not run",
            hooked,
            "remove them, or put hooks on parameters (`parameter.register_hook`), which do run",
        )


def _refuse_objects(values: list[Any]) -> None:
    """Refuse results that are objects with tensors inside: those would be the tensors of the capture."""
    for value in values:
        if not isinstance(value, torch.Tensor) and contains_tensor(value):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise CaptureError(
                "the result holds tensors inside an object",
                [kind],
                "return tensors in tuples, lists, dicts or a ModelOutput, or register the class: "
                f"torch.export.register_dataclass({type(value).__name__}) for a dataclass, "
                "torch.utils._pytree.register_pytree_node for others",
            )


def _refer(values: list[Any], outputs: list[torch.Tensor]) -> tuple[Any, ...]:
    """Replace tensors by `Out(i)`, appending them to the outputs of the graph."""
    refs: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            outputs.append(value)
            refs.append(Out(len(outputs) - 1))
        else:
            refs.append(plain(value))
    return tuple(refs)


def _effects(
    snapshot: Snapshot, written: set[tuple[int, str]], outputs: list[torch.Tensor]
) -> Iterator[Effect]:
    changes = snapshot.changes(written)
    flatten = Flattener([change.value for change in changes], snapshot.knows)
    for change in changes:
        leaves, spec = flatten(change.value, change.name)
        yield Effect(change, change.name, spec, _refer(leaves, outputs))


def _name_contexts(graph: fx.Graph) -> None:
    """Turn order markers of no-grad regions into meta `context` of the nodes between them; drop these and
    those of autocast, which each node knows already."""
    no_grad = False
    ambient = torch.is_grad_enabled()
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is _SET_GRAD:
            no_grad = ambient and not node.args[0]
        else:
            node.meta["context"] = ("torch.no_grad()",) * no_grad
            node.meta.pop("tensor_meta", None)  # `val` says the same
    markers = [n for n in graph.nodes if n.target in (_SET_GRAD, _ENTER_AUTOCAST, _EXIT_AUTOCAST)]
    for node in reversed(markers):
        node.replace_all_uses_with(None)
        graph.erase_node(node)


def _first_use(node: fx.Node) -> str:
    return next((str(user.meta.get("source", "?")) for user in node.users), "?")


def _refused_object(node: fx.Node, value: Any) -> CaptureError:
    """An operator that takes a function or an object with a state of its own, which cells cannot share."""
    names = dict.fromkeys(str(getattr(user.target, "__name__", user.target)) for user in node.users)
    kind = "a function" if isinstance(value, nn.Module) or callable(value) else f"a {type(value).__name__}"
    return CaptureError(
        f"an operator takes {kind}: {', '.join(names)}",
        [f"at {_first_use(node)}"],
        "use operators on tensors alone (scaled_dot_product_attention for flex_attention, torch.where for "
        "torch.cond)",
    )


def _drop_reads(graph: fx.Graph) -> None:
    """Drop what gave numbers: they stand in the graph themselves."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in NUMBERS:
            graph.erase_node(node)


def _leaf(tensor: torch.Tensor, name: str, owners: dict[int, list[Held]]) -> Leaf:
    """Where the model keeps a tensor; a constant of this name if it does not."""
    held, *ties = owners.get(id(tensor)) or [Held(tensor, name, None, None, ())]
    others = tuple(Leaf(tie.name, tensor, tie.holder, tie.key, tie.way) for tie in ties)
    return Leaf(held.name, tensor, held.holder, held.key, held.way, others)


def _leaves(module: fx.GraphModule, owners: dict[int, list[Held]], whole: bool) -> dict[str, Leaf]:
    """Find where the model keeps each tensor that the graph reads; one `get_attr` name a tensor."""
    leaves: dict[str, Leaf] = {}
    named: dict[int, str] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        if not isinstance(tensor, torch.Tensor):
            raise _refused_object(node, tensor)
        if id(tensor) in named:
            node.target = named[id(tensor)]
            continue
        named[id(tensor)] = node.target
        leaf = _leaf(tensor, f"constant{len(leaves)}", owners)
        if leaf.is_constant and isinstance(tensor, FakeTensor):
            if whole:
                raise _BelowError
            raise CaptureError(
                "the forward reads a tensor that tracing cannot follow: `.data` of a parameter or a buffer",
                [f"at {_first_use(node)}"],
                "use `.detach()` instead of `.data`; to update weights, do so outside the forward",
            )
        if not is_plain(tensor):
            raise CaptureError(
                "the forward reads a tensor that is not a plain one",
                [f"{leaf.name}: {kind_name(tensor)}", f"at {_first_use(node)}"],
                "optimize the model with plain parameters, or run it as it is with fallback='sequential'",
            )
        leaves[node.target] = leaf
    return leaves
