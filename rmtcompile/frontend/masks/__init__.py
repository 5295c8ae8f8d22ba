"""Masks: `x[mask]` has as many rows as the values of a tensor say; sums and means need not know how many.

    F.cross_entropy(logits[mask], labels[mask])    cross_entropy(rows, where(mask, labels, ignore_index))
    x[mask].mean()                              -> where(mask, rows, 0).sum() / mask.sum()
    h = self.norm(x[mask])                         norm(rows), and what is not selected filled in again

While a forward is followed, `x[mask]` is a `Selected`: all rows, and which of them count. Operations that
treat each row by itself are applied to all rows; a reduction leaves out those that do not count. Whatever
else such a value reaches is refused with its line.

selected.py   what stands for a selection, and the refusal;  same.py   whether two masks hold the same
rules.py      what may be done with one;  following.py   the forward is followed
"""

from __future__ import annotations

from rmtcompile.frontend.masks.following import Masks
from rmtcompile.frontend.masks.selected import Deferred, refused

__all__ = ["Deferred", "Masks", "refused"]
