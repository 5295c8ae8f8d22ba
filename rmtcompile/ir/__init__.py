"""The program as data: what passes give to each other and the runtime runs."""
