"""Models whose programs are saved in one process and run in another: this file is the other process.

python saving.py FOLDER ...      loads FOLDER/<name> for each case, runs it, writes FOLDER/<name>.pt
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toys import AttributeState, Toy, Uneven, features, made
from zoo.others import ZOO

import rmtcompile


@dataclass(frozen=True)
class Case:
    """A model and its calls.

    Attributes:
        build: makes it, with the same weights each time.
        inputs: of calls that both processes make; no call of the second captures anything.
        trains: whether the calls are made with gradients.
        options: of `optimize`, and of `load`.
        tolerance: relative difference from the model.
    """

    build: Callable[[], Any]
    inputs: Callable[[], list[Tensor]]
    trains: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-10


def armt() -> nn.Module:
    """The reference ARMT; its memory writes something."""
    from transformers import LlamaConfig

    from rmtcompile.models import build

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    model = build(config, segment_size=8, num_mem_tokens=2, d_mem=4)
    for name, parameter in model.named_parameters():
        if "W_mv" in name:
            nn.init.normal_(parameter)
    return model.double().eval()


def tokens(*shapes: tuple[int, int], size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, size, shape, generator=generator) for shape in shapes]


def of_zoo(name: str, **options: Any) -> Case:
    entry = ZOO[name]
    return Case(entry.build, lambda: [entry.inputs(2, n)[0] for n in (3, 1, 4)], **options)


BANDS = {"devices": ["cpu", "cpu"]}
CASES = {
    "skewed": of_zoo("skewed"),
    "armt": Case(armt, lambda: tokens((1, 24), (1, 8), (1, 32))),
    "armt, rests and batches": Case(armt, lambda: tokens((2, 21), (2, 18), (2, 30), (3, 20))),
    "state space": of_zoo("hybrid"),
    "all segments of a layer": of_zoo("transformer_xl"),
    "cache object": of_zoo("cache_object"),
    "buffers": of_zoo("buffer_copy"),
    "attributes": Case(lambda: made(AttributeState), lambda: [features(3), features(3), features(4)]),
    "bands": Case(lambda: made(lambda: Toy(5)), lambda: [features(3), features(7)], options=BANDS),
    "bands, rests": Case(armt, lambda: tokens((2, 21), (2, 18), (2, 30), (3, 20)), options=BANDS),
    "bands, divided by cost": Case(
        lambda: made(lambda: Uneven([8, 8, 2048])), lambda: [features(n, d=16) for n in (4, 6)], options=BANDS
    ),
    "training in bands": Case(
        lambda: made(Toy), lambda: [features(3), features(4)], trains=True, options=BANDS
    ),
    "training": Case(lambda: made(Toy), lambda: [features(3), features(4)], trains=True),
}
COMPILED = {
    "compiled": Case(
        lambda: made(lambda: Toy(2)), lambda: [features(3), features(5)], options={"backend": "inductor"}
    ),
}
if torch.cuda.is_available():
    COMPILED["cuda"] = Case(
        lambda: armt().float().cuda(),
        lambda: [x.cuda() for x in tokens((1, 24), (1, 8), (1, 40), (1, 40))],
        tolerance=1e-3,
    )


def ran(case: Case, model: Any, call: Callable[..., Any]) -> dict[str, Any]:
    """What the calls of a case give, and what they leave in the model."""
    results = []
    with torch.set_grad_enabled(case.trains):
        for x in case.inputs():
            result = call(x)
            results += [value.detach().clone() for value in torch.utils._pytree.tree_leaves(result)]
            if case.trains:
                sum(value.square().sum() for value in torch.utils._pytree.tree_leaves(result)).backward()
    held = dict(left(model)) if isinstance(model, nn.Module) else {}
    grads = [p.grad for p in model.parameters()] if case.trains else []
    return {"results": results, "left": held, "grads": grads}


def left(model: nn.Module) -> Any:
    """Buffers and plain attributes of all modules."""
    for path, module in model.named_modules():
        for name, value in {**module._buffers, **vars(module)}.items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}", value.detach().clone()
            elif isinstance(value, (bool, int)):
                yield f"{path}.{name}", value


def main(folder: Path) -> None:
    """Run the cases that have folders."""
    torch.set_num_threads(1)
    heavy: list[str] | None = None  # what the first case has imported
    for name, case in {**CASES, **COMPILED}.items():
        if (folder / name).exists():
            model = case.build()
            fast = rmtcompile.load(folder / name, model, **case.options)
            found = ran(case, model, fast)
            if heavy is None:
                heavy = [name for name in ("torch._dynamo", "sympy", "networkx") if name in sys.modules]
            found |= {"captures": fast.captures, "explained": str(fast.explain()), "code": fast.code}
            found |= {"heavy": heavy, "missed": _missed(), "traced": _traced()}
            torch.save(found, folder / f"{name}.pt")


def _missed() -> int:
    """Graphs that Inductor has compiled anew."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["fxgraph_cache_miss"])


def _traced() -> int:
    """Graphs that Dynamo has traced."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
