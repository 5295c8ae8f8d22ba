"""The driver: the stages of a compilation in order, and what they give."""
