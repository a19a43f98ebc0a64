"""The faults of scripts/faults.py: each a small program of 4 ranks, and how its job must end.

``case`` says what a case is, ``job`` what its program is given, ``worker`` is one rank of it. The cases, by
what happens: a rank does not come (``absences``), ranks do different things (``mismatches``), one rank ends
(``exceptions``, ``endings``, ``signals``, and with torch ``training``), something was wrong from the start
(``setups``). And ranks end well: ``completions``. ``launch`` runs them, ``report`` says what came out.
"""
