"""The parts of scripts/benchmark.py and scripts/pictures.py.

``cases`` and ``model`` are data and arithmetic, ``timing`` measures, ``peers`` and ``native`` are
measured beside ours, ``layers``, ``kernels``, ``exchanges``, ``resnet`` and ``scaling`` are sections,
``environment`` and ``summary`` say what came out, and where. ``runs`` reads the files of several runs,
``tables`` and ``claims`` write them, ``charts`` and ``diagrams`` draw them in one ``style``.
"""
