"""Random layer-recurrent models against the compiler, for as long as you like: `make fuzz MINUTES=10`.

A model is drawn as data (`spec.py`, `drawing.py`), built (`models.py` of `layers.py`, `memories.py`,
`places.py`, `operations.py`, `results.py`) and run beside `rmtcompile.optimize` of it in float64
(`trials.py`, in a process of its own: `processes.py`). What goes wrong is made as small as it gets
(`shrinking.py`) and written into `found/` (`findings.py`), from where `tests/test_fuzzing.py` replays it.
"""
