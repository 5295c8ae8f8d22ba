"""Reference models.  They know nothing of the compiler, and the compiler never imports them."""

from .armt import ARMT, ARMTOutput, build
from .associative import ARMTConfig, AssociativeLayer
from .checkpoint import load, load_weights, save

__all__ = ["ARMT", "ARMTConfig", "ARMTOutput", "AssociativeLayer", "build", "load", "load_weights", "save"]
