"""Fingerprint: what has to be the same for a saved program to be looked at, in sections of words.

    versions    torch 2.11.0, rmtcompile 0.1.0, Python 3.12.3, packages that the model comes from
    device      the GPU that its tensors lie on
    options     of `optimize`, as far as they decide the program
    modules     layers.0: model.Layer
    tensors     layers.0.W_mem: float32[64, 8] on cpu; which of them share memory
    code        model.Layer.forward 3f09...

What the forward has read of the model's Python state comes after it: see `origin.py`.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

import rmtcompile.passes as passes
from rmtcompile.errors import UnsupportedError
from rmtcompile.options import Options
from rmtcompile.saved.code import version
from rmtcompile.saved.contents import kind_of, tensor_kind
from rmtcompile.saved.moment import Moment

Fingerprint = Mapping[str, Mapping[str, str]]

_NO_MATTER = frozenset({"fallback", "verify", "cuda_graphs", "cache"})
"""Options that decide no program."""
_DIGEST = re.compile("[0-9a-f]{16}")


def fingerprint(moment: Moment, options: Options) -> Fingerprint:
    """The fingerprint of a model.

    Raises:
        UnsupportedError: an option is a function, or the code names what cannot be told.
    """
    code = moment.told().code
    for value in (moment.fn, type(moment.fn), *moment.around.classes, *moment.around.functions.values()):
        code.visit(value)
    for module in moment.modules.values():
        code.visit(type(module))
    versions = {
        "rmtcompile": f"{version('rmtcompile')} ({_own_code()})",
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    return {
        "versions": {**versions, **code.packages},
        "device": dict(_devices(moment, options)),
        "options": dict(_chosen(options)),
        "modules": {label or "the model": kind_of(module) for label, module in moment.modules.items()},
        "tensors": dict(_tensors(moment)),
        "code": code.found,
    }


def differences(then: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs between two fingerprints, in words, the most telling first."""
    found = []
    for section in now:
        before, after = then.get(section, {}), now[section]
        names = dict.fromkeys((*after, *before))
        pairs = ((name, before.get(name), after.get(name)) for name in names)
        found += [_difference(section, name, a, b) for name, a, b in pairs if a != b]
    return found


def _difference(section: str, name: str, before: str | None, after: str | None) -> str:
    if section == "code" and all(text is None or _DIGEST.fullmatch(text) for text in (before, after)):
        return f"the code of {name} is {'new' if before is None else 'gone' if after is None else 'another'}"
    if before is None or after is None:
        return f"{name} is {'new' if before is None else 'gone'}"
    return f"{name} was {before} and is {after}"


@functools.cache
def _own_code() -> str:
    """A digest of rmtcompile itself, of which a version may have many states."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent.parent, *map(Path, passes.__path__)):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _chosen(options: Options) -> Iterator[tuple[str, str]]:
    for one in fields(options):
        value = getattr(options, one.name)
        if one.name in _NO_MATTER:
            continue
        if callable(value):
            raise UnsupportedError(
                f"{one.name} is a function, which has no name in another process",
                [repr(value)],
                "name a backend of torch.compile",
            )
        if one.name == "group" and value is not None:  # each of its ranks has a program of its own
            value = f"rank {dist.get_rank(value)} of {dist.get_world_size(value)}"
        yield one.name, repr(sorted(value) if isinstance(value, frozenset) else value)


def _devices(moment: Moment, options: Options) -> Iterator[tuple[str, str]]:
    """The GPUs that the model lies on, and those that it is given."""
    found = {tensor.device for tensor in _held(moment).values()} | set(options.devices)
    if options.group is not None and torch.cuda.is_available():
        found.add(torch.device("cuda", torch.cuda.current_device()))
    for device in sorted(found, key=str):
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            yield str(device), f"{torch.cuda.get_device_name(device)}, {major}.{minor}"


def _held(moment: Moment) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those of several names each time."""
    found = {}
    for name, root in moment.roots.items():
        for path, tensor in (
            *root.named_parameters(remove_duplicate=False),
            *root.named_buffers(remove_duplicate=False),
        ):
            found[f"{name}.{path}".strip(".")] = tensor
    return found


def _tensors(moment: Moment) -> Iterator[tuple[str, str]]:
    held = _held(moment)
    yield from ((name, tensor_kind(tensor)) for name, tensor in held.items())
    for names in _overlapping(held):
        yield f"memory of {names[0]}", f"shared with {', '.join(names[1:])}"


def _overlapping(held: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of tensors that lie in the same memory, as far as the ends of each show."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), str(tensor.device), name)
        for name, tensor in held.items()
        if tensor.numel() and tensor.device.type != "meta"
    )
    groups: list[list[str]] = []
    end, where = 0, ""
    for first, last, device, name in sorted(spans, key=lambda span: (span[2], span)):
        if groups and device == where and first < end:
            groups[-1].append(name)
            end = max(end, last)
        else:
            groups.append([name])
            end, where = last, device
    return sorted(sorted(names) for names in groups if len(names) > 1)


def _extent(tensor: torch.Tensor) -> int:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


__all__ = ["Fingerprint", "differences", "fingerprint"]
