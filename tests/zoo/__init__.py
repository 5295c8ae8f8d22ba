"""Models that the tests compile: one in the manner of the ARMT authors, the rest in everyone else's."""
