"""The compiler passes, in pipeline order; see docs/how.md for the order."""
