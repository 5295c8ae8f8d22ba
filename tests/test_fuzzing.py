"""fuzzing/: what was found is replayed; specs are data; each class of outcome is told apart."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from fuzzing import trials as trials_module
from fuzzing.drawing import draw
from fuzzing.findings import FOUND, keep, read
from fuzzing.memories import MEMORIES
from fuzzing.models import Model, build, inputs
from fuzzing.operations import OPERATIONS
from fuzzing.places import PLACES
from fuzzing.processes import trial_apart, trials
from fuzzing.results import RESULTS
from fuzzing.shrinking import shrink, simpler
from fuzzing.spec import Kind, Spec
from fuzzing.trials import FAILURES, Outcome, trial


@pytest.mark.parametrize("path", sorted(FOUND.glob("*.json")), ids=lambda path: path.stem)
def test_found(path: pytest.FixtureRequest, request: pytest.FixtureRequest) -> None:
    """What was wrong once is equal today, or refused where that is the right answer; open ones say why."""
    finding = read(path)
    if finding.open:
        request.node.add_marker(pytest.mark.xfail(reason=finding.open, strict=True))
    outcome = trial_apart(finding.spec, 120)
    assert outcome.kind in ("equal", *["refused"] * finding.refused), outcome


def test_a_few_drawn_models() -> None:
    for spec in (draw(seed) for seed in range(3)):
        outcome = trial_apart(spec, 300)
        assert outcome.kind not in FAILURES, (spec.to_json(), outcome)


def test_every_spec_is_data() -> None:
    specs = [draw(seed) for seed in range(300)]
    assert all(Spec.from_json(spec.to_json()) == spec for spec in specs)
    assert all(any(getattr(spec, field.name) != field.default for spec in specs) for field in fields(Spec))
    assert Spec().to_json() == "{}"


@pytest.mark.parametrize(
    "specs",
    [
        [Spec((Kind(name),)) for name in MEMORIES],
        [Spec((Kind(operations=(name,)),)) for name in OPERATIONS],
        [Spec(place=name, write=write) for name in PLACES for write in ("assign", "copy_", "slices")],
        [Spec(result=name) for name in RESULTS],
        [Spec(order=order, cut=cut) for order in ("layers", "inside") for cut in ("front", "view", "narrow")],
    ],
    ids=["memories", "operations", "places", "results", "orders"],
)
def test_every_feature_is_a_model(specs: list[Spec]) -> None:
    """Places, writes and cuts change nothing that is computed."""
    given = [build(spec)(*inputs(spec)[0]) for spec in specs]
    if specs[0].place != specs[-1].place or specs[0].cut != specs[-1].cut:
        for other in given:
            torch.testing.assert_close(given[0], other)


def test_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        schedule = model = None
        error: Exception | None = None

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            if self.error:
                raise self.error
            return self.model(x) + 1e-3

    def optimized(model: Model, **_: object) -> Broken:
        broken.model = model
        return broken

    broken = Broken()
    monkeypatch.setattr(trials_module.rmtcompile, "optimize", optimized)
    assert trial(Spec()).kind == "wrong"
    broken.error = trials_module.UnsupportedError("no such thing")
    assert trial(Spec()) == Outcome("refused", "UnsupportedError: no such thing")
    broken.error = KeyError("x")
    assert trial(Spec()).kind == "crash"
    assert trial(Spec(place="stacked", kinds=(Kind("vector"), Kind("associative")))).kind == "no model"


def test_a_trial_that_hangs_or_dies_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(spec: Spec) -> Outcome:
        if spec.seed == 1:
            raise SystemExit(3)
        while spec.seed == 2:
            pass
        return Outcome("equal")

    monkeypatch.setattr("fuzzing.processes.trial", odd)
    ended = {spec.seed: outcome for spec, outcome, _ in trials((Spec(seed=n) for n in range(4)), 2, 2)}
    assert {seed: outcome.kind for seed, outcome in ended.items()} == {
        0: "equal",
        1: "crash",
        2: "slow",
        3: "equal",
    }


def test_failures_shrink_to_what_they_need() -> None:
    def fails(spec: Spec) -> bool:
        return spec.layers > 1 and spec.place == "queue" and any("roll" in k.operations for k in spec.kinds)

    large = replace(
        draw(0),
        kinds=(Kind("none", ("tanh",)), Kind("cache", ("norm", "roll", "tanh"), ((1, 1),), "learned")),
        layers=3,
        place="queue",
        prologue=("conv", "tanh"),
    )
    small = shrink(large, fails)
    kinds = (Kind("none", ("roll",)),)
    assert small == replace(Spec(kinds, place="queue"), segment=large.segment, lengths=small.lengths)
    assert not any(fails(other) for other in simpler(small))


def test_findings_are_files(tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing.findings.FOUND", tmp_path)
    from fuzzing.findings import Finding

    finding = Finding(draw(7), Outcome("wrong", "result: relative error 1e-01"))
    assert read(keep(finding)) == finding
