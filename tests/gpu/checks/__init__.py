"""What scripts/gpu_check runs, by pytest.

``points`` is the list of what runs, and ``test_points`` runs it: ``launch`` starts each part as a job of its
own, ``report`` makes the JSON and the table of what pytest reports. ``worker`` is one rank of a part,
``records`` what it writes down, ``context`` what every check is given, ``reference`` data and bars.
The others are the checks: ``versions`` (1), ``race`` (2), ``correctness`` and ``large`` (3), ``repeats`` (4),
``latency`` (5), ``bandwidth`` and ``speed`` (6), ``features``, ``streams`` and ``arrays`` (7),
``sanitize`` (8), and ``stream`` (9).
"""
