"""What there is to look at: explanations, dumps, views and profiles of compiled programs.

names.py             what the user's program calls a value
explanation.py       what was found, and why it runs as it does, as data;  findings.py  fills it in
explanation_text.py  the same as text and HTML
carries.py           what flows from segment to segment;  scheduled.py  the schedule with it
plans.py             what the runtime measured of its plans
texts.py             each stage of the compiler as text;  dump.py writes them to a folder
view.py              a compiled program for the viewer;  cells.py, passes.py, pass_texts.py  parts of it
shown.py             the path of a written file, which a notebook shows
profiled.py          measured times, as data;  profile_text.py  as text
profiling.py         measures them, level by level;  profiling_bands.py  for programs in bands
calls.py             how a call is run for that;  clocks.py, rates.py, kinds.py, backward.py  what is measured
"""

from __future__ import annotations

from rmtcompile.report.dump import dump, use
from rmtcompile.report.explanation import Explanation, Refusal
from rmtcompile.report.findings import explain_last, explain_refusal
from rmtcompile.report.profiled import Profile
from rmtcompile.report.profiling import profile
from rmtcompile.report.view import save_view, view_model

__all__ = [
    "Explanation",
    "Profile",
    "Refusal",
    "dump",
    "explain_last",
    "explain_refusal",
    "profile",
    "save_view",
    "use",
    "view_model",
]
