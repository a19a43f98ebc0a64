"""The checks of scripts/gpu_check, which runs them with pytest.

``points`` lists the numbered points and their parts, and ``test_points`` runs each part as a test.
``launch`` starts a part as a job of its own, and ``worker`` is one rank of that job. ``context``
has the argument of every check, ``reference`` the data and the largest errors allowed, ``records``
the file that a rank writes its findings to. ``report`` writes the JSON file and the table.

The other modules are the checks, with the numbers of their points: ``versions`` (1), ``race`` (2),
``correctness`` and ``large`` (3), ``repeats`` (4), ``latency`` (5), ``bandwidth`` and ``speed``
(6), ``features``, ``streams`` and ``arrays`` (7), ``sanitize`` (8), ``stream`` (9), and ``tiles``,
which runs with --tune.
"""
