"""Weights: which leaves of the model make the value of a weight placeholder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """Leaves that make one placeholder's value: per layer, a tuple of leaf names concatenated along dim 0.

        Weight((("layers.0.q", "layers.0.k"), ("layers.1.q", "layers.1.k")))      # 2 layers, 2 parts each

    Attributes:
        leaves: `leaves[layer][part]` is the name of a leaf; all layers have the same number of parts.
    """

    leaves: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if len({len(parts) for parts in self.leaves}) > 1:
            raise ValueError(f"layers differ in their number of parts: {self.leaves}")

    @property
    def n_layers(self) -> int:
        """How many layers share the placeholder."""
        return len(self.leaves)
