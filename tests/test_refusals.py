"""What is refused: each message says what, where, and what would help."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import SEGMENT, WIDTH, Layer, Toy, assert_same, features, made

import rmtcompile
from rmtcompile.errors import CaptureError, PartitionError, RerollError, RMTCompileError, UnsupportedError


def refusal(
    model: Any, *args: Any, kind: type[UnsupportedError] = UnsupportedError, **options: Any
) -> list[str]:
    """The lines of the message with which a call is refused."""
    with pytest.raises(kind) as caught:
        rmtcompile.optimize(model, **options)(*args)
    return str(caught.value).splitlines()


class Walk(nn.Module):
    """Segments and layers, with `step` to override: (layer index, x, state) -> (x, state)."""

    def __init__(self, n_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(n_layers))

    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers[l](x, m)

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            for l in range(len(self.layers)):
                h, memory[l] = self.step(l, h, memory[l])
            out.append(h)
        return torch.cat(out, 1)


@torch.no_grad()
def test_classic_rmt_warns_with_the_edge_that_blocks() -> None:
    """The top layer's memory enters the bottom layer of the next segment."""
    model = made(lambda: Toy(n_layers=3, up=-2))
    with pytest.warns(rmtcompile.SequentialScheduleWarning) as caught:
        rmtcompile.optimize(model)(features(4))
    (message,) = {str(warning.message) for warning in caught}
    assert message.startswith("no two cells can run together, the 3 layers run one after the other: ")
    assert "offset (1, -2)" in message
    assert "cell (s, 0) " in message and "cell (s - 1, 2) " in message
    assert message.count("toys.py:") == 2


@torch.no_grad()
def test_classic_rmt_warning_names_the_modules() -> None:
    with pytest.warns(rmtcompile.SequentialScheduleWarning) as caught:
        rmtcompile.optimize(made(lambda: Toy(n_layers=3, up=-2)))(features(4))
    assert "layers.0" in str(caught[0].message) and "layers.2" in str(caught[0].message)


@torch.no_grad()
def test_classic_rmt_is_refused_where_diagonals_are_asked_for() -> None:
    lines = refusal(made(lambda: Toy(n_layers=3, up=-2)), features(4), plan="diagonal")
    assert lines[0].startswith("no two cells can run together")
    assert lines[-1] == "  help: use plan='auto' to run it as a compiled sequential program"


class BranchOnValue(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        if x.sum() > 0:
            m = m + 1
        return self.layers[l](x, m)


class ItemOfTensor(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers[l](x * float(m.max().item() + 1), m)


class ShapeFromValue(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers[l](x, m + x[x > 0].max())


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (BranchOnValue, "if x.sum() > 0:"),
        (ItemOfTensor, "m.max().item()"),
        (ShapeFromValue, "x[x > 0].max()"),
    ],
)
@torch.no_grad()
def test_data_dependent_control_flow(model: Any, line: str) -> None:
    lines = refusal(made(model), features(3), kind=CaptureError)
    assert lines[0].startswith("the forward depends on the values of a tensor")
    assert "test_refusals.py:" in lines[1] and line in lines[1]
    assert lines[-1].startswith("  help: decide it from shapes or Python values")


class Doubling(Walk):
    """What each layer keeps doubles with every segment."""

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor | None] = [None for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                kept = seen[l]
                seen[l] = kept = h if kept is None else torch.cat([kept, kept, h], 1)
                h, _ = layer(h, kept.mean(1))
            out.append(h)
        return torch.cat(out, 1)


@torch.no_grad()
def test_a_cache_that_does_not_grow_evenly() -> None:
    model = made(Doubling)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert torch.allclose(model(features(4)), fast(features(4)), atol=1e-12)
    with pytest.raises(RerollError) as caught:
        fast.run(features(4))
    lines = str(caught.value).splitlines()
    assert any("cat" in line and "test_refusals.py:" in line for line in lines[1:])
    assert lines[-1].startswith("  help: ")


class CallsDepend(Walk):
    """The last layer is skipped in every other segment."""

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        out = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for l, layer in enumerate(self.layers):
                if l < 2 or s % 2 == 0:
                    h, memory[l] = layer(h, memory[l])
            out.append(h)
        return torch.cat(out, 1)


@torch.no_grad()
def test_layers_called_unevenly() -> None:
    lines = refusal(made(CallsDepend), features(4))
    assert any("layers.2" in line or "segment" in line for line in lines)
    assert lines[-1].startswith("  help: ")


class CallsUntil(Walk):
    """A layer is called until its state is large enough."""

    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x, m = self.layers[l](x, m)
        while m.norm() < 1:
            x, m = self.layers[l](x, m)
        return x, m


@torch.no_grad()
def test_calls_that_depend_on_values() -> None:
    lines = refusal(made(CallsUntil), features(3), kind=CaptureError)
    assert lines[0].startswith("the forward depends on the values of a tensor")
    assert "test_refusals.py:" in lines[1] and "while m.norm() < 1:" in lines[1]
    assert lines[-1].startswith("  help: decide it from shapes or Python values")


class WritesParameter(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        self.layers[l].mix.bias.add_(0.1)
        return self.layers[l](x, m)


class WritesData(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        self.layers[l].mix.bias.data.add_(0.1)
        return self.layers[l](x, m)


class SetsData(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.layers[l].mix.bias
        bias.data = bias.data + 0.1
        return self.layers[l](x, m)


@pytest.mark.parametrize("build", [WritesParameter, WritesData, SetsData])
@torch.no_grad()
def test_parameter_writes(build: Any) -> None:
    """... and a refused write was not made."""
    model = made(build)
    before = {name: p.clone() for name, p in model.named_parameters()}
    lines = refusal(model, features(3), kind=CaptureError)
    assert lines[0] == "the forward writes into a parameter"
    assert "mix.bias" in lines[1] or build is SetsData
    assert "test_refusals.py:" in lines[1]
    assert lines[-1].startswith("  help: ")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


class Shortcut(Walk):
    """Drops a mask that is all ones, as Hugging Face code does, before it cuts its input or after."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        if self.early and torch.all(mask == 1):
            return super().forward(x)
        out = []
        for h, m in zip(x.split(SEGMENT, 1), mask.split(SEGMENT, 1), strict=True):
            if not torch.all(m == 1):
                h = h * m[..., None]
            out.append(h)
        return super().forward(torch.cat(out, 1))


@pytest.mark.parametrize("early", [True, False])
def test_shortcuts_of_masks(early: bool) -> None:
    x = features(3)
    lines = refusal(made(functools.partial(Shortcut, early)), x, torch.ones(x.shape[:2]), kind=CaptureError)
    assert lines[0].startswith("the forward depends on the values of a tensor")
    assert "test_refusals.py:" in lines[1] and "torch.all(m" in lines[1]
    assert "no attention_mask instead of one that is all ones" in lines[-1]


class Fails(Walk):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ torch.ones(WIDTH + 1, WIDTH, dtype=x.dtype))


def test_an_error_before_the_first_cut_is_shown() -> None:
    lines = refusal(made(Fails), features(3), kind=CaptureError)
    assert lines[0].startswith("the forward could not be traced: RuntimeError: ")
    assert "test_refusals.py:" in "".join(lines) and "WIDTH + 1" in "".join(lines)


class NoSegments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_no_segments() -> None:
    lines = refusal(made(NoSegments), features(3), kind=PartitionError)
    assert lines[0] == "the forward does not cut any of its inputs into segments"
    assert lines[1] == "  input 0: shape (2, 9, 4)"
    assert "segment_size=" in lines[-1]


@torch.no_grad()
def test_wrong_layers() -> None:
    lines = refusal(made(Toy), features(3), kind=PartitionError, layers="model.blocks")
    assert lines[0] == "layers='model.blocks': no module that the forward calls has such a path"
    assert lines[1].strip().startswith(("nearest: ", "there are: ")) and "layers" in lines[1]
    lines = refusal(made(Toy), features(3), kind=PartitionError, layers="layer")
    assert lines[1].strip().startswith("nearest: layers") and "layers='layers'" in lines[-1]


@torch.no_grad()
def test_empty_input() -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model)
    for empty in (features(2)[:0], features(2)[:, :0]):  # first without segments that are known
        with pytest.raises(UnsupportedError, match="the input is empty") as caught:
            fast(empty)
        assert "help: pass at least one token" in str(caught.value)
        fast(features(2))


class Straight(torch.autograd.Function):
    """Signs, with the gradient of what they are signs of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class OwnBackward(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x, m = super().step(l, x, m)
        return x, Straight.apply(m)


class Reentrant(Walk):
    """Its first layer gets no gradients: nothing that goes in there has any."""

    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        new, _ = checkpoint(super().step, l, x.detach(), m.detach(), use_reentrant=True)
        return x + new, m + new.mean(1)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("build", "name"), [(OwnBackward, "Straight"), (Reentrant, "CheckpointFunction")])
def test_a_backward_of_its_own(build: Any, name: str) -> None:
    model, x = made(build), features(3).requires_grad_()
    lines = refusal(model, x, kind=CaptureError)
    assert lines[0] == "the forward has a backward of its own, which tracing cannot see"
    assert lines[1].startswith(f"  {name} at ") and "test_refusals.py:" in lines[1]
    assert "use_reentrant=False" in lines[2]
    with torch.no_grad():
        assert_same(model(x), rmtcompile.optimize(model)(x))
    model(x).sum().backward()  # refused while tracing only


class Raises(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("no such thing")


class RaisesAtOnce(Walk):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such thing")


@pytest.mark.parametrize("build", [Raises, RaisesAtOnce])
@pytest.mark.parametrize("options", [{}, {"segment_size": SEGMENT}])
@torch.no_grad()
def test_an_error_of_the_model_is_shown_with_its_line(build: Any, options: dict[str, Any]) -> None:
    """Also where it is raised before an input is cut."""
    lines = refusal(made(build), features(3), kind=CaptureError, **options)
    assert "ValueError: no such thing" in lines[0]
    assert "test_refusals.py:" in lines[1] and 'raise ValueError("no such thing")' in lines[1]


def test_every_refusal_is_one_family() -> None:
    assert issubclass(UnsupportedError, RMTCompileError)
    error = UnsupportedError("what", ["where"], "do this")
    assert str(error).splitlines() == ["what", "  where", "  help: do this"]
    assert (error.what, error.evidence, error.remedy) == ("what", ("where",), "do this")


@dataclasses.dataclass
class Answer:
    """A result of the user's own."""

    hidden: Tensor
    first: Tensor


class Answering(Toy):
    def forward(self, x: Tensor) -> Any:
        hidden = super().forward(x)
        return {"hidden": hidden, "answer": Answer(hidden, hidden[:, 0])}


class Registered(Answer):
    """The same, known to torch."""


@torch.no_grad()
def test_objects_with_tensors_in_the_result() -> None:
    lines = refusal(made(Answering), features(3), kind=CaptureError)
    assert lines[0] == "the result holds tensors inside an object" and lines[1].endswith(".Answer")
    assert "torch.export.register_dataclass(Answer)" in lines[-1]


@torch.no_grad()
def test_registered_dataclasses_are_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Answer", Registered)
    torch.export.register_dataclass(Registered)
    model = made(Answering)
    fast = rmtcompile.optimize(model)
    for segments in (3, 5):
        expected, got = model(features(segments))["answer"], fast(features(segments))["answer"]
        assert isinstance(got, Registered)
        assert_same((expected.hidden, expected.first), (got.hidden, got.first))


class Collector:
    """An object of the user's that keeps count."""

    def __init__(self) -> None:
        self.seen = 0


class Collects(Toy):
    """Puts something into what it is given, which may lie inside of it."""

    def forward(self, x: Tensor, into: Any) -> Tensor:
        y = super().forward(x)
        match into:
            case list():
                into.append(y.mean())
            case {"inner": list(inner)}:
                inner[0] = y.mean()
            case dict():
                into["mean"] = y.mean()
            case set():
                into.add("called")
            case _:
                into.seen += 1
        return y


@torch.no_grad()
@pytest.mark.parametrize(
    ("into", "name"),
    [
        (list, "into (list)"),
        (dict, "into (dict)"),
        (lambda: {"inner": [torch.ones(())]}, "into.inner (list), in a dict"),
        (set, "into (set)"),
        (Collector, "into (Collector)"),
    ],
    ids=["list", "dict", "nested", "set", "object"],
)
def test_arguments_that_the_forward_fills(into: Any, name: str) -> None:
    given, before = into(), into()
    lines = refusal(made(Collects), features(3), given, kind=CaptureError)
    assert lines[0] == "the forward changes a list, a dict or another object among its arguments"
    assert lines[1].strip() == name
    assert getattr(given, "seen", given) == getattr(before, "seen", before), "it was put back"


@torch.no_grad()
def test_arguments_that_are_only_read() -> None:
    fast = rmtcompile.optimize(made(Reading))
    for into in ({"by": [torch.tensor(2.0)]}, {"by": [torch.tensor(3.0)]}):
        assert_same(fast.model(features(4), into), fast(features(4), into))
    assert fast.captures == 1


class Reading(Toy):
    def forward(self, x: Tensor, into: dict[str, list[Tensor]]) -> Tensor:
        return super().forward(x) * into["by"][0]
