"""Code: the names that a function uses.

    def forward(self, x):                  names of it       Linear, gain, head, x ...: attributes, too
        return self.head(x) * gain         its globals       gain
"""

from __future__ import annotations

import dis
import functools
import types

_LOOKED_UP = frozenset(
    dis.opmap[name]
    for name in (
        "LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS",
    )
    if name in dis.opmap
)  # fmt: skip


def names_in(code: types.CodeType) -> frozenset[str]:
    """All names in a function's code, those of attributes too, functions inside it included."""
    inner = (names_in(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(code.co_names).union(*inner)


@functools.cache
def globals_in(code: types.CodeType) -> frozenset[str]:
    """Names that a function's code looks up in its module, functions inside it included."""
    mine = {str(x.argval) for x in dis.get_instructions(code) if x.opcode in _LOOKED_UP}
    inner = (globals_in(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(mine).union(*inner)


__all__ = ["globals_in", "names_in"]
