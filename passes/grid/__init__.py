"""Passes on the grid of cells (segment, layer): from a few segments to any number, levels, lanes."""
