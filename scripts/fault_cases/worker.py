"""One rank of a case: ``python -m fault_cases.worker TOPIC.PROGRAM FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path


def main(name: str, folder: str) -> None:
    from fault_cases.case import cases
    from fault_cases.job import Job

    (case,) = (case for case in cases() if case.name == name)
    case.program(Job(Path(folder), case))


if __name__ == "__main__":
    main(*sys.argv[1:])
