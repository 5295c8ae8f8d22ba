"""What a Python model holds around its forward: objects, state, guards. The only part that knows live
objects."""
