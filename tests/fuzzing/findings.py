"""What was found, as JSON files in `found/`: the spec, what happened, and why it still may."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fuzzing.spec import Spec
from fuzzing.trials import Outcome

FOUND = Path(__file__).parent / "found"


@dataclass(frozen=True)
class Finding:
    """A spec that failed once.

    Attributes:
        outcome: how it failed.
        open: why it still fails; empty where it was mended.
        refused: whether a refusal is the right answer, rather than an equal result.
    """

    spec: Spec
    outcome: Outcome
    open: str = ""
    refused: bool = False


def keep(finding: Finding) -> Path:
    """Write it down, under a name of its contents."""
    text = finding.spec.to_json()
    path = FOUND / f"{finding.outcome.kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    found = {
        "spec": json.loads(text),
        "was": f"{finding.outcome.kind}: {finding.outcome.line}",
        "refused": finding.refused,
        "open": finding.open,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def read(path: Path) -> Finding:
    """What `keep` wrote."""
    found = json.loads(path.read_text())
    kind, line = found["was"].split(": ", 1)
    return Finding(
        Spec.from_json(json.dumps(found["spec"])), Outcome(kind, line), found["open"], found["refused"]
    )


def known() -> list[Finding]:
    """All that was found."""
    return [read(path) for path in sorted(FOUND.glob("*.json"))]
