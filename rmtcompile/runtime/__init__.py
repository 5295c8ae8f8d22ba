"""What emitted code runs on: lanes between cells, taps, stacked weights."""

from rmtcompile.runtime.run import Run, Window
from rmtcompile.runtime.stacks import Stacks
from rmtcompile.runtime.storage import LaneStore, TapStore

__all__ = ["LaneStore", "Run", "Stacks", "TapStore", "Window"]
