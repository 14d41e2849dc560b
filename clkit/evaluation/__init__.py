"""Continual evaluation: the history of a run, its metrics, and the callback that records it.

The names live in their modules; :mod:`~clkit.evaluation.history`, :mod:`~clkit.evaluation.functional` and
:mod:`~clkit.evaluation.summary` need NumPy and SciPy alone.
"""
