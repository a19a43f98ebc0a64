"""The parts of scripts/benchmark.py and scripts/pictures.py.

- ``cases`` and ``model`` are data and arithmetic.
- ``timing`` measures. ``peers`` and ``native`` are code that ours is compared with.
- ``layers``, ``kernels``, ``exchanges``, ``watchdog``, ``masks``, ``resnet``, ``memory``,
  ``reductions`` and ``scaling`` measure the sections.
- ``environment`` describes the machine and the software, ``summary`` compares figures with aims.
- ``runs`` reads the result files of several runs, ``tables`` and ``claims`` write tables of them,
  ``charts`` and ``diagrams`` draw pictures, and ``style`` is the common style of these.
"""
