"""The examples of docs/guides/integrations.md equal their tools' own runs in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import documented
import pytest

from support.jobs import End
from support.ranks import no_exchange, starts_mpiexec


@starts_mpiexec
@pytest.mark.full("each starts two jobs that import large packages")
@pytest.mark.parametrize(
    "example",
    # test_lightning.py tests the other package
    [example for example in documented.EXAMPLES if example.distribution != "pytorch-lightning"],
    ids=lambda example: example.distribution,
)
def test_two_ranks_are_as_one_process(
    example: documented.Example, tmp_path: Path, run_job: Callable[..., End]
) -> None:
    if documented.version(example) is None:
        pytest.skip(f"{example.distribution} is not installed: pip install -e '.[integrations]'")
    result = documented.compare(example, tmp_path, run_job)
    assert result.distance < documented.TOLERANCE
    assert result.glue > 0


@no_exchange
def test_the_table_has_a_row_for_each_example() -> None:
    rows = (documented.ROOT / "docs" / "results" / "integrations.md").read_text().splitlines()
    tools = [row.split(" | ")[0].removeprefix("| ") for row in rows if row.startswith("| ")]
    examples = [example.distribution for example in documented.EXAMPLES]
    assert tools == ["tool", "---", *examples], "scripts/integrations --write makes it"
