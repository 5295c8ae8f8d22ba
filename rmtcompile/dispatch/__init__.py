"""Which program serves a call, whether its rules hold there, and what the call leaves behind."""
