"""Trained on a task: a small ARMT learns it sequentially and on diagonals, and then reads longer texts.

Two tasks are written on the fly. In `retrieval` each segment holds a key and its value, and the last one
asks for the value that a key got last (after arXiv 2407.04841). In `needle` persons move to places, here and
there in a long filler text, and the end asks where one is (after BABILong). Both models start alike and
see the same texts, so that their losses can be compared step by step. The one on diagonals then reads texts
that grow, part by part with a carried state, and the model itself, with the same weights, some of them too.

    python benchmarks/trained_on_a_task.py --task retrieval needle --json figures.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import rmtcompile
from rmtcompile.models import build


@dataclass(frozen=True)
class Task:
    """Facts, each a name and its value, in filler text; asked is the latest value of a name.

    Attributes:
        names, values, words: how many tokens there are of each kind; words fill the text.
        verb, ask: how many tokens stand between name and value, and before the name in the question.
        facts: how many a text starts with, and gets again whenever it is twice as long; None: one a segment.
        both: (segments, steps, copies of each fact in its segment) of the training of both models.
        longer: the same of what the one on diagonals goes on with.
    """

    names: int
    values: int
    words: int
    verb: int
    ask: int
    facts: int | None
    both: tuple[tuple[int, int, int], ...]
    longer: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Preset:
    """All sizes: of the tasks, the decoder, its memory, the training (rate, steps until it is reached, batch)
    and the reading: texts at once, segments that one call reads, tokens of the longest text for each of the
    two."""

    tasks: dict[str, Task]
    decoder: dict[str, int]
    memory: dict[str, int]
    rate: float
    warm_up: int
    batch: int
    texts: int
    part: int
    read_up_to: int
    sequential_up_to: int


QUESTIONS = 8
"""Asked at each length of a text that is read in parts, from one state; the model answers the first."""

SHORT, LONG = ((3, 150, 1), (4, 15, 1)), ((6, 30, 1),)
FIRST, LATER = ((3, 1200, 8), (3, 300, 2), (3, 200, 1), (4, 200, 1)), ((8, 500, 1), (16, 400, 1))
PRESETS = {
    "small": Preset(
        {"retrieval": Task(3, 8, 4, 0, 1, None, SHORT, LONG), "needle": Task(3, 8, 4, 1, 1, 2, SHORT, LONG)},
        {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
        {"segment_size": 6, "num_mem_tokens": 1, "d_mem": 24},
        rate=2e-3, warm_up=1, batch=64, texts=32, part=32, read_up_to=768, sequential_up_to=768,
    ),
    "full": Preset(
        {
            "retrieval": Task(4, 16, 64, 0, 1, None, FIRST, LATER),
            "needle": Task(4, 16, 64, 2, 2, 2, FIRST, LATER),
        },
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
        {"segment_size": 64, "num_mem_tokens": 4, "d_mem": 32},
        rate=1e-3, warm_up=100, batch=64, texts=8, part=256, read_up_to=50_000_000, sequential_up_to=1 << 17,
    ),
}  # fmt: skip


class Story:
    """Texts that go on, segment by segment; `known`: i64[B, names], the latest value of each name, or -1."""

    def __init__(self, task: Task, segment: int, rows: int, seed: int, device: str) -> None:
        self.task, self.segment, self.device = task, segment, device
        self.random = torch.Generator(device).manual_seed(seed)
        self.known = torch.full((rows, task.names), -1, device=device)
        # Each word is followed by one of three, the same in all texts.
        follow = torch.randint(task.words, (task.words, 3), generator=torch.Generator().manual_seed(0))
        self.follow = follow.to(device)
        tokens = task.names + task.values + torch.arange(task.verb + task.ask, device=device)
        self.verb, self.ask = tokens[: task.verb], tokens[task.verb :]

    def facts(self, segments: int) -> Tensor:
        """Which of the next segments hold a fact: bool[B, segments]."""
        rows, n = len(self.known), self.task.facts
        chances = torch.rand(rows, segments, generator=self.random, device=self.device)
        top = chances.topk(segments if n is None else min(n, segments)).indices
        return torch.zeros_like(chances).scatter(1, top, 1).bool()

    def go_on(self, facts: Tensor, copies: int = 1) -> Tensor:
        """The next segments: bool[B, S], which of them hold a fact -> i64[B, S * segment]."""
        task, shape, text = self.task, facts.shape, self._filler(*facts.shape)
        names, values = self._draw(task.names, *shape), self._draw(task.values, *shape)
        fact = torch.cat([names[..., None], self.verb.expand(*shape, -1), task.names + values[..., None]], 2)
        for start in self._draw(self.segment + 1 - fact.shape[2], copies, *shape):
            at = start[..., None] + torch.arange(fact.shape[2], device=self.device)
            text.scatter_(2, at, torch.where(facts[..., None], fact, text.gather(2, at)))
        for name in range(task.names):
            order = torch.where(facts & (names == name), torch.arange(shape[1], device=self.device), -1)
            last = order.amax(1)
            value = values.gather(1, last[:, None].clamp(min=0))[:, 0]
            self.known[:, name] = torch.where(last >= 0, value, self.known[:, name])
        return text.flatten(1)

    def question(self) -> Tensor:
        """A last segment, i64[B, segment], that asks for a known name; its last token is the answer."""
        text = self._filler(len(self.known), 1)[:, 0]
        chances = torch.rand(self.known.shape, generator=self.random, device=self.device)
        name = chances.masked_fill(self.known < 0, -1).argmax(1, keepdim=True)
        text[:, -2 - self.task.ask : -2] = self.ask
        text[:, -2:] = torch.cat([name, self.task.names + self.known.gather(1, name)], 1)
        return text

    def _draw(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.random, device=self.device)

    def _filler(self, rows: int, segments: int) -> Tensor:
        """Sentences of eight words, cut into segments: i64[B, S, segment]."""
        sentences = -(-segments * self.segment // 8)
        words = [self._draw(self.task.words, rows, sentences)]
        for choice in self._draw(3, 7, rows, sentences):
            words.append(self.follow[words[-1], choice])
        text = torch.stack(words, 2).flatten(1)[:, : segments * self.segment].view(rows, segments, -1)
        return text + vocabulary(self.task) - self.task.words


def vocabulary(task: Task) -> int:
    return task.names + task.values + task.verb + task.ask + task.words


def whole(preset: Preset, task: Task, segments: int, copies: int, seed: int, device: str) -> Iterator[Tensor]:
    """Endless batches of texts with a question at the end: i64[B, segments * segment]."""
    for i in itertools.count():
        story = Story(task, preset.memory["segment_size"], preset.batch, 1_000_003 * seed + i, device)
        yield torch.cat([story.go_on(story.facts(segments - 1), copies), story.question()], 1)


def make_model(preset: Preset, task: Task, seed: int, device: str, dtype: torch.dtype) -> nn.Module:
    """An ARMT with random weights, in which what is asked for starts out looking like what was stored."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary(task),
        initializer_range=1.2 * preset.decoder["hidden_size"] ** -0.5,
        max_position_embeddings=2 * preset.memory["segment_size"],
        **preset.decoder,
    )
    model = build(config, **preset.memory, dtype=dtype)
    with torch.no_grad():
        for layer in model.memory_cell.layers:
            layer.W_mk.weight.copy_(layer.W_mq.weight)
    if dtype == torch.float64:  # transformers' norms round to float32, whatever the dtype
        for parent, (name, norm) in [(m, child) for m in model.modules() for child in m.named_children()]:
            if name.endswith("norm"):
                setattr(parent, name, nn.RMSNorm(len(norm.weight), norm.variance_epsilon, dtype=dtype))
    return model.to(device)


def answered(logits: Tensor, ids: Tensor) -> Tensor:
    """The part of texts i64[B, T] whose last token, the answer, is predicted by logits f[B, n, V]: f64[]."""
    return (logits[:, -2].argmax(-1) == ids[:, -1]).double().mean()


def only_answer(ids: Tensor) -> Tensor:
    """Labels i64[B, T]: the last token, and nothing else."""
    return ids.index_fill(1, torch.arange(ids.shape[1] - 1, device=ids.device), -100)


def difference_of_gradients(fast: Any, ids: Tensor) -> float:
    """At the same weights, on i64[B, T]: the largest difference, relative to each parameter's largest."""
    one, other = (
        torch.autograd.grad(run(ids, labels=only_answer(ids)).loss, [*run.parameters()])
        for run in (fast.model, fast)
    )
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(one, other))


def optimizer_of(run: Any, preset: Preset) -> tuple[Any, Any]:
    """What steps, and what sets its rate."""
    # While the memory is empty some gradients are nothing but rounding: a small eps would follow them.
    optimizer = torch.optim.AdamW(run.parameters(), preset.rate, (0.9, 0.98), eps=1e-6, weight_decay=0)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / preset.warm_up))
    return optimizer, warm_up


def train(
    run: Any, optimizers: tuple[Any, Any], batches: Callable[..., Any], stages: Any, say: str
) -> dict[str, Any]:
    """Train; gives the loss of each step, the median of a step's milliseconds for each stage, all seconds."""
    found: dict[str, Any] = {"stages": stages, "loss": [], "step_ms": [], "right": [], "seconds": 0.0}
    begin, (optimizer, warm_up) = time.perf_counter(), optimizers
    for segments, steps, copies in stages:
        times = []
        for step, ids in enumerate(itertools.islice(batches(segments, copies), steps), 1):
            start = time.perf_counter()
            out = run(ids, labels=only_answer(ids))
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(run.parameters(), 1.0)
            optimizer.step()
            warm_up.step()
            optimizer.zero_grad()
            found["loss"].append(out.loss.item())
            times.append(1e3 * (time.perf_counter() - start))
            found["right"].append(float(answered(out.logits, ids)))
            found["seconds"] = time.perf_counter() - begin
            if step % 30 == 0 or step == steps:
                loss, right = (statistics.fmean(found[name][-30:]) for name in ("loss", "right"))
                where = f"{segments} segments, step {step} of {steps}"
                spent = f"{found['seconds']:.0f} s"
                print(f"  {say}: {where}, loss {loss:.3f}, {right:.0%} right, {spent}", flush=True)
        found["step_ms"].append(statistics.median(times))
    return found


def compare(
    preset: Preset, name: str, seed: int, device: str, dtype: torch.dtype, control: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Train twice, alike but for how the model runs; gives the optimized model and the figures.

    As a control a third model may be trained sequentially, whose weights differ by a rounding.
    """
    task = preset.tasks[name]
    model = make_model(preset, task, seed, device, dtype)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    found: dict[str, Any] = {"chance": 1 / task.values}
    runs = {"sequential": model, "diagonal": fast}
    if control:
        runs = {"control": copy.deepcopy(model), **runs}
        with torch.no_grad():
            torch._foreach_mul_([*runs["control"].parameters()], 1 + torch.finfo(dtype).eps)

    def batches(segments: int, copies: int) -> Iterator[Tensor]:
        return whole(preset, task, segments, copies, 1 + seed, device)

    for side, run in runs.items():
        optimizers = optimizer_of(run, preset)
        found[side] = train(run, optimizers, batches, task.both, f"{name}, {side}")
        held_out = replace(preset, batch=preset.texts)
        unseen = itertools.islice(whole(held_out, task, task.both[-1][0], 1, 500 + seed, device), 16)
        with torch.no_grad():
            found[side]["accuracy"] = statistics.fmean(
                float(answered(run(ids, logits_to_keep=2).logits, ids)) for ids in unseen
            )
    losses = list(zip(*(found[side]["loss"] for side in ("sequential", "diagonal", *runs)), strict=True))
    found["largest_difference_of_losses"] = max(abs(a - b) for a, b, *_ in losses)
    found["difference_of_gradients"] = difference_of_gradients(fast, next(batches(task.both[-1][0], 1)))
    print(f"{name}: step, loss sequential, difference of diagonal" + ", of control" * control)
    for i in sorted({*range(0, len(losses), 20), len(losses) - 1}):
        one, diagonal, other = losses[i][:3]
        print(f"  {i + 1:>5}  {one:.6f}  {diagonal - one:+.0e}" + f"  {other - one:+.0e}" * control)
    print(f"  largest difference of the losses {found['largest_difference_of_losses']:.1e}")
    print(f"  at the same weights, gradients differ by {found['difference_of_gradients']:.1e} (relative)")
    for side in runs:
        one = found[side]
        steps = ", ".join(f"{n} segments {ms:.0f} ms" for (n, *_), ms in zip(task.both, one["step_ms"]))
        print(f"  {side}: {one['accuracy']:.1%} right on unseen texts (chance {found['chance']:.1%}), "
              f"{one['seconds']:.1f} s; a step of {steps}")  # fmt: skip
    found["longer"] = train(fast, optimizers, batches, task.longer, f"{name}, diagonal, longer")
    return fast, found


@torch.no_grad()
def read(
    fast: Any, preset: Preset, name: str, seed: int, device: str, budget: float
) -> Iterator[dict[str, Any]]:
    """Read texts that grow, each part once; a row of figures for each length, as soon as it is read.

    A state is a value: at each length all questions go on from it, and so does the text. Stops before a
    length that would take more seconds than the budget has.
    """
    segment, rows, longest = preset.memory["segment_size"], preset.texts, preset.read_up_to
    story, begin = Story(preset.tasks[name], segment, rows, 900 + seed, device), time.perf_counter()
    # The rules are looked at once, for the longest text; this input takes no memory.
    longest_text = story.known.new_zeros(rows, 1).expand(rows, longest // segment * segment)
    fast.prepare(longest_text, logits_to_keep=2)
    spent = time.perf_counter() - begin
    print(f"{name}: reading {rows} texts, after {spent:.1f} s that prepare for the longest")
    print("       tokens   right  seconds   tokens/s   sequential: right  seconds  same answers  difference")
    lengths = [*itertools.takewhile(lambda n: n < longest // segment, (4 << i for i in range(60)))]
    state, text, done, seconds = None, [], 0, [0.0]
    for n in [*lengths, longest // segment]:
        if len(seconds) > 3 and time.perf_counter() - begin + 2.2 * (seconds[-1] - seconds[-2]) > budget:
            print(f"  stopped before {n * segment:,} tokens: there is no time left")
            break
        is_read_twice = n * segment <= preset.sequential_up_to
        start, facts = clock(device), story.facts(n - 1 - done)
        for at in range(0, facts.shape[1], preset.part):
            part = story.go_on(facts[:, at : at + preset.part])
            _, state = fast.run(part, state=state, logits_to_keep=2)
            text += [part] if is_read_twice else []
            if sys.stderr.isatty():
                print(f"  {(done + at) * segment:,} tokens", end="\r", file=sys.stderr, flush=True)
        questions = [story.question() for _ in range(QUESTIONS)]
        logits = [fast.run(asked, state=state, logits_to_keep=2)[0].logits for asked in questions]
        right = statistics.fmean(float(answered(*pair)) for pair in zip(logits, questions))
        done, spent = n - 1, clock(device) - start
        seconds.append(seconds[-1] + spent)
        row = {"tokens": n * segment, "accuracy": right, "seconds": seconds[-1]}
        row["tokens_per_second"] = rows * (facts.shape[1] + 1) * segment / spent
        pace = row["tokens_per_second"]
        print(f"{n * segment:>13,}  {right:>6.1%}  {seconds[-1]:>7.2f}  {pace:>9,.0f}", end="")
        if is_read_twice:
            ids, start = torch.cat([*text, questions[0]], 1), clock(device)
            expected = fast.model(ids, logits_to_keep=2).logits
            row["sequential_seconds"], a, b = clock(device) - start, logits[0][:, -2], expected[:, -2]
            row["sequential_accuracy"] = float(answered(expected, ids))
            row["agreement"] = float((a.argmax(-1) == b.argmax(-1)).double().mean())
            row["difference"] = float((a - b).abs().max() / b.abs().max())
            print(
                f"  {row['sequential_accuracy']:>17.1%}  {row['sequential_seconds']:>7.2f}"
                f"  {row['agreement']:>12.1%}  {row['difference']:>10.1e}",
                end="",
            )
        print(flush=True)
        yield row


def clock(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def main(*arguments: str) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--task", nargs="+", choices=["retrieval", "needle"], help="default: retrieval; on a GPU both")
    add("--preset", choices=PRESETS, default="full" if gpu else "small", help="sizes (here: %(default)s)")
    add("--device", default="cuda" if gpu else "cpu", help="here: %(default)s")
    add("--dtype", help="of the parameters (default: float64 for small, float32 for full)")
    add("--seed", type=int, default=0, help="of weights and texts (default: %(default)s)")
    add("--control", action="store_true", help="train once more, from weights that differ by a rounding")
    add("--read-up-to", type=int, metavar="TOKENS", help="the longest text (default: the preset's)")
    add("--sequential-up-to", type=int, metavar="TOKENS", help="the longest that the model itself reads, too")
    add("--segment", type=int, metavar="TOKENS", help="of a segment (default: the preset's)")
    add("--budget", type=float, default=130, metavar="SECONDS", help="of reading, a task (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    given = parser.parse_args(arguments)
    limits = {name: getattr(given, name) for name in ("read_up_to", "sequential_up_to")}
    preset = replace(PRESETS[given.preset], **{name: n for name, n in limits.items() if n is not None})
    if given.segment:
        preset = replace(preset, memory={**preset.memory, "segment_size": given.segment})
    dtype = given.dtype or ("float64" if given.preset == "small" else "float32")
    device = torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU"
    words = ["python benchmarks/trained_on_a_task.py", *(word.rpartition("/")[2] for word in arguments)]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    found: dict[str, Any] = {"command": " ".join(words), **versions, "device": device, "dtype": dtype}
    found |= {"preset": asdict(preset), "tasks": {}}

    def save() -> None:
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n")

    print(f"device: {device}, {dtype}")
    for name in given.task or (["retrieval", "needle"] if gpu else ["retrieval"]):
        fast, figures = compare(preset, name, given.seed, given.device, getattr(torch, dtype), given.control)
        found["tasks"][name] = {**figures, "reading": []}
        save()
        for row in read(fast, preset, name, given.seed, given.device, given.budget):
            found["tasks"][name]["reading"].append(row)
            save()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
