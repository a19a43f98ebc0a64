"""The parts of scripts/benchmark.py.

``cases`` and ``model`` are data and arithmetic, ``timing`` measures, ``peers`` and ``native`` are
measured beside ours, ``layers``, ``kernels``, ``exchanges``, ``resnet`` and ``scaling`` are sections,
``environment``, ``summary`` and ``plots`` say what came out, and where.
"""
