"""The compiler passes, in pipeline order; see README for the order."""
