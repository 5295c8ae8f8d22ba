"""runtime/bands/ranks.py: bands in several processes, over gloo, and over NCCL where there are devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from rmtcompile.runtime.bands.agreement import anywhere

HERE = Path(__file__).parent
LIMIT = 500
"""Seconds that processes may take."""

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def ranks(count: int, cases: str, folder: Path, device: str = "cpu") -> list[Any]:
    """What each rank says; none of them may hang."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "ranks.py")]
    running = [
        subprocess.Popen(
            [*command, device, str(rank), str(count), str(folder / "ranks"), cases],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    said = []
    try:
        for process in running:
            out, err = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, err[-2000:]
            said.append(json.loads(out.splitlines()[-1]) if out.strip() else None)
    finally:
        for process in running:
            process.kill()
            process.communicate()  # closes its pipes
    return said


CASES = (
    "same", "recorded", "recorded_elsewhere", "recorded_failing", "own_weights", "mesh",
    "other_weights", "other_lengths", "failing", "training", "steps", "retained", "parts", "sharded", "saved",
    "without_gradients_on_one", "undoable", "added", "ending", "kinds_of_results", "checkpointed",
    "backward_failing", "backward_and_call", "other_orders", "other_losses", "state_on_one",
    "failing_with_caches",
    "late", "persisting", "hooked", "setup",
    "profile_and_call", "other_buffers", "queued", "queued_failing", "queued_again", "queued_elsewhere",
    "queued_written",
)  # fmt: skip


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What three ranks say in each case; workers of one run of the tests ask them once."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FileLock(folder / "ranks.lock"):
        known = folder / "ranks.json"
        if not known.exists():
            known.write_text(json.dumps(ranks(3, " ".join(CASES), tmp_path_factory.mktemp("ranks"))))
    found = json.loads(known.read_text())
    return {case: [one[case] for one in found] for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_rank_gets_what_the_model_gives(count: int, tmp_path: Path) -> None:
    """Results, gradients, a text in parts."""
    cases = ("same", "training", "parts")
    assert ranks(count, " ".join(cases), tmp_path) == [dict.fromkeys(cases, "same")] * count


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
def test_over_nccl(tmp_path: Path) -> None:
    same = ("same", "recorded", "own_weights", "from_host", "training", "steps", "parts", "hooked", "queued")
    failing = ("recorded_failing", "other_weights", "failing", "backward_failing")
    cases = (*same, "mesh", "sharded", "saved", *failing)
    one, other = ranks(2, " ".join(cases), tmp_path, "cuda")
    assert all(one[case] == other[case] for case in cases if case not in ("sharded", "saved"))
    assert all(one[case] == "same" for case in same), one
    assert one["saved"][0] == other["saved"][0] == [0, 1, 1] and one["backward_failing"][0] == "RankError"
    assert one["recorded_failing"][0] == "RankError"
    assert one["other_weights"][0] == "UnsupportedError" and one["failing"][0] == "RankError"


def test_a_mesh_and_a_ragged_end(said: dict[str, list[Any]]) -> None:
    assert set(said["mesh"]) == {said["mesh"][0]}
    assert said["mesh"][0].startswith("bands     4 layers in 3 bands")


def test_other_weights_are_found_before_the_first_level(said: dict[str, list[Any]]) -> None:
    for kind, text in said["other_weights"]:
        lines = text.splitlines()
        assert kind == "UnsupportedError" and "different things: the weights" in lines[0]
        assert lines[1].startswith("  rank 0: ") and lines[2].startswith("  rank 1: ")


def test_other_lengths_are_found_before_the_first_level(said: dict[str, list[Any]]) -> None:
    for kind, text in said["other_lengths"]:
        assert kind == "UnsupportedError" and "the number of segments" in text.splitlines()[0]


def test_a_rank_that_raises_ends_all_with_one_message(said: dict[str, list[Any]]) -> None:
    for one in said["failing"]:
        assert one == ["RankError", "rank 1, level 1: ZeroDivisionError: of no use"]


def test_a_rank_whose_backward_fails_ends_all(said: dict[str, list[Any]]) -> None:
    for kind, text in said["backward_failing"]:
        assert kind.endswith("Error") and "rank 1, backward of level " in text and "of no use" in text, text


def test_backward_has_to_run_on_all_ranks(said: dict[str, list[Any]]) -> None:
    for kind, text in said["backward_and_call"]:
        assert kind == "UnsupportedError" and "rank 0 is about to run a program" in text, text
        assert "rank 1 is about to run backward" in text


def test_backward_is_of_one_run_and_one_loss(said: dict[str, list[Any]]) -> None:
    for kind, text in said["other_orders"]:
        assert kind == "UnsupportedError" and "in which order backward runs" in text
    for told in said["other_losses"]:
        for kind, text in told:
            assert kind == "UnsupportedError" and "they have other losses" in text


def test_a_rank_that_fails_sends_no_caches(said: dict[str, list[Any]]) -> None:
    for kind, text in said["failing_with_caches"]:
        assert kind == "RankError" and text == "rank 0, level 0: ZeroDivisionError: of no use"


def test_what_all_raise_is_taken_for_no_other_error(said: dict[str, list[Any]]) -> None:
    for kind, text in said["state_on_one"]:
        assert kind == "UnsupportedError" and "ranks are about to run different things" in text, text


def test_recorded_levels_serve_any_length(said: dict[str, list[Any]]) -> None:
    assert said["recorded"] == ["same"] * 3


def test_ranks_replay_only_together(said: dict[str, list[Any]]) -> None:
    assert [seen for seen, _ in said["recorded_elsewhere"]] == [[]] * 3
    assert "rank 0: out of order" in said["recorded_elsewhere"][2][1]


def test_all_launch_again_where_a_recording_does_not_hold(said: dict[str, list[Any]]) -> None:
    for kind, message in said["recorded_failing"]:
        assert kind == "RankError" and message.startswith("rank 1, level 1: ZeroDivisionError"), message


def test_a_rank_stacks_its_own_layers(said: dict[str, list[Any]]) -> None:
    assert said["own_weights"] == ["same"] * 3


def test_gradients_that_are_one_tensor_are_added_up_once(said: dict[str, list[Any]]) -> None:
    assert said["added"] == ["same"] * 3


def test_where_a_program_stops_all_ranks_make_another_one(said: dict[str, list[Any]]) -> None:
    assert said["ending"] == ["same"] * 3


def test_results_of_types_that_backends_do_not_know(said: dict[str, list[Any]]) -> None:
    assert said["kinds_of_results"] == ["same"] * 3


def test_a_checkpoint_around_ranks_is_said_to_have_no_effect(said: dict[str, list[Any]]) -> None:
    assert said["checkpointed"] == ["same"] * 3


def test_a_rank_that_fails_before_its_first_level_ends_all(said: dict[str, list[Any]]) -> None:
    others = [told for rank, told in enumerate(said["late"]) if rank != 1]
    assert all(kind == "RankError" and message.startswith("rank 1: ") for kind, message in others), others
    assert said["late"][1][0] != "RankError"


def test_hooks_are_called_once(said: dict[str, list[Any]]) -> None:
    assert said["hooked"] == ["same"] * 3


def test_ranks_are_in_step_after_an_error_that_was_caught(said: dict[str, list[Any]]) -> None:
    assert all(kind in ("UnsupportedError", "RankError", "CaptureError") for kind, _ in said["persisting"])


def test_a_rank_that_cannot_begin_leaves_nobody_waiting(said: dict[str, list[Any]]) -> None:
    for kind, message in said["setup"]:
        assert kind == "RankError" and "rank 1, before its first level: ZeroDivisionError" in message


def test_ranks_that_do_different_things_are_told(said: dict[str, list[Any]]) -> None:
    for kind, message in said["profile_and_call"]:
        assert kind == "UnsupportedError" and "rank 1 is about to measure a profile" in message
    for kind, message in said["other_buffers"]:
        assert kind == "UnsupportedError" and "the weights and buffers" in message


def test_every_rank_of_three_gets_results_and_gradients(said: dict[str, list[Any]]) -> None:
    assert said["same"] == said["training"] == ["same"] * 3


def test_weights_stay_those_of_the_model_over_steps(said: dict[str, list[Any]]) -> None:
    assert said["steps"] == ["same"] * 3


def test_a_second_backward_needs_a_retained_graph(said: dict[str, list[Any]]) -> None:
    assert said["retained"] == [["RuntimeError", said["retained"][0][1]]] * 3
    assert "retain_graph=True" in said["retained"][0][1]


def test_a_text_in_parts_with_gradients_through_its_state(said: dict[str, list[Any]]) -> None:
    assert said["parts"] == ["same"] * 3


def test_ranks_keep_their_own_part_of_a_state(said: dict[str, list[Any]]) -> None:
    for saved, alone, gathered, other, mixed, joined in said["sharded"]:
        assert saved[0] == alone[0] == joined[0] == "StateError"
        assert "alone" in saved[1] and "state.gathered()" in saved[1] and "state.gathered()" in joined[1]
        assert "lacks values" in alone[1] and "state.gathered()" in alone[1]
        assert gathered[0] == other[0] == mixed[0] == "UnsupportedError"
        assert "parts of other states" in gathered[1] and "different things: the state" in other[1]
        assert "different things: the state" in mixed[1]


def test_ranks_load_what_each_has_saved_or_none_does(said: dict[str, list[Any]]) -> None:
    for captures, notes, others in said["saved"]:
        assert captures == [0, 1, 1] and notes[-1] == "rank 1 found none for its part of the program"
        assert others[-1] == "ranks found parts of different programs"


def test_gradients_on_some_ranks_only_are_found_before_the_first_level(said: dict[str, list[Any]]) -> None:
    for kind, text in said["without_gradients_on_one"]:
        assert kind == "UnsupportedError" and "what has gradients" in text.splitlines()[0]


def test_a_queue_of_texts_is_one_wavefront(said: dict[str, list[Any]]) -> None:
    assert said["queued"] == said["queued_again"] == ["same"] * 3


def test_a_text_that_fails_on_one_rank_stops_no_other(said: dict[str, list[Any]]) -> None:
    assert said["queued_failing"][0] == said["queued_failing"][1] == said["queued_failing"][2]
    assert [index for index, _ in said["queued_failing"][0]] == [1]
    assert "IndexError" in said["queued_failing"][0][0][1]


def test_ranks_that_read_other_queues_are_told(said: dict[str, list[Any]]) -> None:
    for rank, (texts, *queues) in enumerate(said["queued_elsewhere"]):
        assert texts[::2] == ["ran", "ran"] and "different things: the arguments' values" in texts[1]
        for (_, told), why in zip(queues, ("", ": KeyError: 'mine'", ": KeyError: 'mine'"), strict=True):
            ends = f"rank 1 is about to end a queue of documents{why}\n"
            assert ends in told if rank != 1 or not why else told == "'mine'"


def test_what_is_written_while_texts_are_on_their_way(said: dict[str, list[Any]]) -> None:
    for one in said["queued_written"]:
        assert len(one) == 1 and "written over" in one[0] and "rank 1 has written it" in one[0]


def test_data_parallel_around_bands(tmp_path: Path) -> None:
    assert ranks(4, "replicas", tmp_path) == [{"replicas": "same"}] * 4


def test_what_processes_cannot_do_is_refused(said: dict[str, list[Any]]) -> None:
    for weight, transform, twice in said["undoable"]:
        assert weight[0] == "UnsupportedError" and "layers.0.mix.weight" in weight[1]
        assert transform[0] == "UnsupportedError" and "torch.func" in transform[1]
        assert twice[0] == "UnsupportedError" and "gradients of gradients" in twice[1]


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    gone, left = ranks(2, "leaving", tmp_path)
    assert gone is None and left["leaving"][0] == "RankError"
    assert "does not answer any more" in left["leaving"][1]


def test_a_rank_s_own_device_makes_no_other_program() -> None:
    source = 'x = aten.arange(4, device=torch.device("{}"))'
    one, other = (anywhere(source.format(f"cuda:{i}"), torch.device(f"cuda:{i}")) for i in range(2))
    assert one == other != anywhere(source.format("cuda:0"), torch.device("cuda:1"))
