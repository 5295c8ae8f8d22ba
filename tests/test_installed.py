"""A program in the place of a model's own forward: who runs it, what copies have, how it is taken away."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from toys import Toy, assert_same, features, made

import rmtcompile


@torch.no_grad()
def test_the_calls_of_a_model_run_what_is_installed() -> None:
    model, seen = made(Toy), []
    own, expected = set(vars(model)), model(features(4))
    program = rmtcompile.install(model)
    model.register_forward_hook(lambda module, args, out: seen.append(module))
    assert model.forward is program and isinstance(model, Toy)
    for _ in range(2):
        assert_same(expected, model(features(4)))
    assert_same(expected, model.forward(features(4)))
    model.register_forward_pre_hook(lambda module, args: None)
    assert_same(expected, model(features(4)))
    assert program.captures == 1 and program.schedule.width == 3 and seen == [model] * 3
    assert inspect.signature(model.forward) == inspect.signature(Toy().forward)
    assert str(rmtcompile.explain(model)) == str(program.explain())
    assert list(model.state_dict()) == list(Toy().state_dict())
    rmtcompile.uninstall(model)
    assert set(vars(model)) == own
    assert_same(expected, model(features(4)))


@torch.no_grad()
@pytest.mark.parametrize("root", ["model", "program"])
def test_copies_of_a_model_have_a_program_of_their_own(root: str) -> None:
    model = made(Toy)
    program = rmtcompile.install(model)
    expected = model(features(4))
    for copied in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        if root == "model":
            again = copied(model)
        else:
            again = copied(program).model.__self__
        assert again is not model and again.forward is not program
        assert again.forward.model.__self__ is again
        assert_same(expected, again(features(4)))
        assert again.forward.captures == 1
        rmtcompile.uninstall(again)
        again.layers[0].mix.weight.zero_()
        assert not torch.equal(expected, again(features(4)))
    assert_same(expected, model(features(4)))


def test_what_cannot_be_installed() -> None:
    model = made(Toy)
    rmtcompile.install(model)
    for call in (
        lambda: rmtcompile.install(model),
        lambda: rmtcompile.optimize(model),
        lambda: rmtcompile.install(rmtcompile.optimize(made(Toy))),
        lambda: rmtcompile.install(made(Toy).forward),
        lambda: rmtcompile.install(made(Toy), backend="foo"),
        lambda: rmtcompile.uninstall(made(Toy)),
    ):
        with pytest.raises(ValueError):
            call()


@torch.no_grad()
def test_a_model_inside_of_another_is_captured_with_it() -> None:
    outer = nn.Sequential(made(Toy), nn.Tanh())
    expected = outer(features(4))
    program = rmtcompile.install(outer[0])
    whole = rmtcompile.optimize(outer)
    assert_same(expected, whole(features(4)))
    assert program.captures == 0
    assert_same(expected, outer(features(4)))
    assert program.captures == 1
