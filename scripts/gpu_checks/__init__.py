"""The parts of scripts/gpu_check.py.

``points`` is the list of what runs, ``launch`` runs it, ``report`` says what came out. ``worker`` is one rank
of a run, ``records`` what it writes down, ``context`` what every check is given, ``reference`` the whole
batch in float64. The others are the checks: ``versions`` (1), ``race`` (2), ``correctness`` and ``large``
(3), ``repeats`` (4), ``latency`` (5), ``bandwidth`` and ``speed`` (6), ``features``, ``streams`` and
``arrays`` (7), ``sanitize`` (8).
"""
