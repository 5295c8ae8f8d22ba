"""What users call: `optimize` a model, `explain` what was found in it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from torch import nn

from rmtcompile.compiler.stages import Progress
from rmtcompile.errors import UnsupportedError
from rmtcompile.installed import Installed, installed_in, unwrapped
from rmtcompile.module import OptimizedModule, class_for
from rmtcompile.optimized import Optimized
from rmtcompile.options import (
    Chosen,
    Devices,
    Options,
    bands_on,
    cache_folder,
    check_options,
    group_of,
    layers_on,
)

if TYPE_CHECKING:
    from rmtcompile.report import Explanation


@overload
def optimize(model: nn.Module, **options: Unpack[Chosen]) -> OptimizedModule: ...


@overload
def optimize(model: Callable[..., Any], **options: Unpack[Chosen]) -> Optimized: ...


def optimize(
    model: Callable[..., Any],
    *,
    segment_size: int | None = None,
    layers: str | None = None,
    plan: str = "auto",
    backend: str | Callable[..., Any] = "auto",
    cuda_graphs: str | bool = "auto",
    fallback: str | None = None,
    verify: bool = False,
    progress: bool | Progress = False,
    recompute: str | int = "auto",
    cache: str | PathLike[str] | Literal[False] | None = None,
    devices: Devices = None,
) -> Optimized:
    """Make a recurrent-memory model run a diagonal at a time, with the same inputs, outputs and recurrence.

    Nothing is traced yet: the forward is captured at the first call, from the shapes of its inputs.

    Args:
        model: an `nn.Module` or any callable on tensors whose forward walks segments and, in each segment,
            layers. It is not changed, except that its parameters become views of stacked storage (same names,
            shapes and values).
        segment_size: override: tokens in a segment along the axis that the forward walks; found from the
            graph by default.
        layers: override: path of the container of the layers, `"model.layers"`, or a regular expression for
            their paths.
        plan: "auto" (the widest legal wavefront; on CUDA the sequential plan where a cell alone is measured
            to cost less than one in company), "diagonal" (the widest, but refuse a model whose wavefronts are
            one cell wide) or "sequential" (one cell after the other, compiled).
        backend: "eager", "inductor" or any `torch.compile` backend for the cell functions; "auto" is inductor
            on CUDA and eager elsewhere.
        cuda_graphs: record blocks of levels as CUDA graphs, which serve inputs of any length, or whole runs
            where that cannot be (`explain` says which); "auto" does so on CUDA when no gradients are
            recorded.
        fallback: "sequential" runs the model as it is, with a warning, where it cannot be compiled, and does
            not try again for inputs of these shapes; None raises.
        verify: run the model as it is, too, at the first call of each program, and raise on a difference.
        recompute: what backward computes again instead of keeping it. "level": each level, from what lies
            between levels; a number k: blocks of k levels, and in each of them its levels, so that memory
            grows with levels / k + k; "none": nothing; "auto": "level" where the forward itself uses
            `torch.utils.checkpoint`; else, on CUDA, levels for whose values there is no memory, on one
            device. Values and gradients are the same.
        devices: cut the layers into bands, one a device: `["cuda:0", "cuda:1"]`, or "auto" for all CUDA
            devices. Layers are balanced by what they are measured to cost, or `{"cuda:0": 6, "cuda:1": 10}`
            says how many each device has. Each band runs its layers' part of every wavefront and hands on
            what the next one reads. The model, its arguments and results stay where they are; bands on other
            devices have copies of their layers' weights. Or a process group, or a `DeviceMesh` of one
            dimension: each rank runs a band of the model that it has, all ranks call alike, and each gets the
            whole result. One program on one device by default.
        progress: print what is being done on long work, or call a function with each line.
        cache: a folder in which programs are saved when they are compiled, and looked for before: see `load`.
            Several processes may use one folder, for any models. By default the folder that the environment
            variable `RMTCOMPILE_CACHE` names, if it is set; False: none, whatever it says.

    Returns:
        What is called like `model`, and has `schedule`, `code`, `explain()`. For a module it is a module: its
        parameters, their names, `state_dict`, `train`, `to` and all other attributes are the model's.

    Raises:
        ValueError: an option has no such value.

    Source: "Diagonal Batching Unlocks Parallelism in Recurrent Memory Transformers for Long Contexts", arXiv
    2506.05229.
    """
    check_options(
        segment_size, layers, plan, backend, cuda_graphs, fallback, verify, progress, recompute, cache
    )
    if not callable(model):
        raise ValueError(f"model must be callable, not {type(model).__name__}")
    if isinstance(model, OptimizedModule) and model.is_wrapped:
        raise ValueError("this optimized module has hooks or another forward: optimize the model itself")
    model = unwrapped(model)
    if installed_in(model) is not None:
        raise ValueError(
            "a program is installed in this model: call the model, or rmtcompile.uninstall(model) first"
        )
    report = print if progress is True else progress if callable(progress) else None
    folder = cache_folder(cache)
    on = bands_on(devices, plan, recompute)
    group = group_of(devices)
    how = plan, backend, cuda_graphs, fallback, verify, recompute
    options = Options(layers, segment_size, *how, folder, on, group, layers_on(devices))
    if isinstance(model, nn.Module):
        return class_for(type(model))(model, options, report)
    return Optimized(model, options, report)


@overload
def load(folder: str | PathLike[str], model: nn.Module, **options: Unpack[Chosen]) -> OptimizedModule: ...


@overload
def load(folder: str | PathLike[str], model: Callable[..., Any], **options: Unpack[Chosen]) -> Optimized: ...


def load(
    folder: str | PathLike[str], model: Callable[..., Any], **options: Unpack[Chosen]
) -> Optimized:
    """Optimize a model with the programs that `save` has written, or `optimize(cache=...)`.

        fast.save("programs")                             one process
        fast = rmtcompile.load("programs", model)         another: the first call captures nothing

    A program is used where the model has the same structure, shapes and types, its forward the same code,
    what the forward reads of its modules (flags, numbers, configurations) the same contents, and torch,
    rmtcompile and Python are the same; weights are the model's own. What no saved program serves is captured
    as ever, and an `IgnoredWarning` says what differs; nothing is written.

    Args:
        folder: where the programs lie.
        model, options: as for `optimize`; options that decide a program must be those that it was saved with.

    Raises:
        ValueError: there is no such folder, or an option has no such value.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {os.fspath(folder)!r}")
    options.setdefault("cache", False)
    fast = optimize(model, **options)
    fast._programs.shelf.look_in(folder)
    return fast


def install(model: nn.Module, **options: Unpack[Chosen]) -> Optimized:
    """Put the program into the model itself, in the manner of `nn.Module.compile`: its own calls run it.

        rmtcompile.install(model)
        model(ids)                     the program, and so do what calls the model: a Trainer, PEFT, DDP
        model.forward.schedule         what `optimize` gives, as `model.forward`

    `model.forward` is replaced; the model's class, its names and its other methods stay. Hooks of the model
    itself run at each call, around the program. Methods that call the model (`generate` of Hugging Face) call
    the program; what they pass and no program can hold, a cache object, is refused, or run as it is with
    `fallback="sequential"`. Methods that call parts of the model (`generate` of the reference ARMT) run these
    as they are. A copy or a pickle of the model has a program of its own.

    Args:
        model: a module; what `torch.compile` has made of one stands for that one.
        options: see `optimize`.

    Returns:
        What is `model.forward` now: `schedule`, `code`, `explain()`.

    Raises:
        ValueError: it is no module, a program is installed already, or an option has no such value.
    """
    if isinstance(model, Optimized) or not isinstance(model, nn.Module):
        raise ValueError(f"install takes the model itself, an nn.Module, not {type(model).__name__}")
    model = unwrapped(model)
    made = optimize(model, **options)
    return Installed.into(model, made.options, made._programs.progress)


def uninstall(model: nn.Module) -> None:
    """Undo `install`: the model runs its own forward again, also where others have wrapped the installed one.

    Raises:
        ValueError: no program is installed.
    """
    program = installed_in(unwrapped(model))
    if program is None:
        raise ValueError("no program is installed in this model")
    program.remove()


def explain(model: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Say what the compiler finds in `model` when it is called as `model(*args, **kwargs)`; nothing is run.

    A model that is refused is explained, too: the evidence, and what would help.

    Args:
        model: an `nn.Module` or any callable on tensors, or what `optimize` gave for one.  Without
            further arguments, the program of its last call is explained.

    Raises:
        RMTCompileError: without arguments, and nothing was captured yet.
    """
    from rmtcompile.report import explain_last, explain_refusal

    fast = model if isinstance(model, Optimized) else installed_in(model) or optimize(model)
    if not args and not kwargs:
        return explain_last(fast)
    reached = ["probe"]
    try:
        with fast.reporting(reached.append), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is part of the explanation
            fast.prepare(*args, **kwargs)
    except UnsupportedError as error:
        return explain_refusal(fast, error, reached[-1], args, kwargs)
    return explain_last(fast)


__all__ = ["explain", "install", "load", "optimize", "uninstall"]
