"""Known: what tensors hold while a forward runs on fake tensors, where no input decides it.

    span = self.span.max().item()          the parameter is there: 0.7, and the program holds for that value
    n = torch.zeros(1) ... int(n + T)      nothing but code decides it: 4, in any call
    if x.max() > 0: ...                    an input decides it: refused

Operations on tensors that are known are noted as they come, none is computed. When the forward reads a
number (`item`, `bool`, `tolist`, an index, a NumPy array) those that lead to it are run on the real tensors,
in the order of the forward, in-place writes included. The tensors that such a number came from are kept, so
that `rmtcompile/binding/values.py` can see whether they still hold the same.

records.py    operations, tensors and memory as they are noted;  following.py  the forward is followed
reading.py    functions that read memory without an operation
"""

from __future__ import annotations

from rmtcompile.frontend.known.following import NUMBERS, Known
from rmtcompile.frontend.known.reading import Reads

__all__ = ["NUMBERS", "Known", "Reads"]
