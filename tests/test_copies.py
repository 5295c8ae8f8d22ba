"""runtime/copies.py: many copies at once, and memory to copy to."""

from __future__ import annotations

import pytest
import torch

from rmtcompile.runtime.copies import copies_of, copy_all, filled_from, room_for

VALUES = {
    "contiguous": torch.arange(6.0).view(2, 3),
    "transposed": torch.arange(6.0).view(3, 2).t(),
    "expanded": torch.arange(3.0).view(1, 3).expand(2, 3),
    "part": torch.arange(12.0).view(2, 6)[:, :3],
    "empty": torch.zeros(2, 0),
    "integers": torch.arange(6).view(2, 3),
}


@pytest.mark.parametrize("name", VALUES)
def test_room_has_the_strides_of_a_dense_value(name: str) -> None:
    value = VALUES[name]
    room = room_for(value)
    assert torch.equal(room, value)
    assert room.untyped_storage().data_ptr() != value.untyped_storage().data_ptr() or not value.numel()
    if name != "part":
        assert room.stride() == value.stride()
    else:
        assert room.is_contiguous()


def test_values_are_copied_to_their_places() -> None:
    values = list(VALUES.values())
    places = [room_for(torch.zeros_like(x) if name != "expanded" else x) for name, x in VALUES.items()]
    places[2].untyped_storage().fill_(0)
    copy_all(places, values)
    assert all(torch.equal(place, value) for place, value in zip(places, values, strict=True))


def test_copies_have_memory_of_their_own() -> None:
    values = [torch.zeros(2, 3), torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(4, dtype=torch.int64)]
    copies = copies_of(values)
    for value, copy in zip(values, copies, strict=True):
        assert torch.equal(copy, value) and copy.stride() == value.stride()
        value.add_(1)
        assert not torch.equal(copy, value)


def test_values_are_filled_from_others() -> None:
    new = [torch.ones(1), torch.zeros(1), torch.full((1,), 2.0)]
    filled = filled_from(iter(new), [torch.zeros(1), (torch.zeros(1), "name"), {"a": torch.zeros(1)}])
    assert filled[0] is new[0] and filled[1] == (new[1], "name") and filled[2]["a"] is new[2]
