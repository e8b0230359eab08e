"""What the tests of commits share: forked processes that commit, and a run to which nothing happens."""

from collections.abc import Iterator

import pytest
from commits import Clean, Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture(scope="session")
def clean(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """The files and the steps of a run without a fault."""
    return forks.golden(tmp_path_factory.mktemp("clean") / "run")
