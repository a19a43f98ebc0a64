"""Run one rank of a case: ``python -m liveness.faults.worker TOPIC.PROGRAM``."""

from __future__ import annotations

import resource
import sys


def main(name: str) -> None:
    from .case import cases
    from .job import Job

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    (case,) = (case for case in cases() if case.name == name)
    case.program(Job(case))


if __name__ == "__main__":
    main(*sys.argv[1:])
