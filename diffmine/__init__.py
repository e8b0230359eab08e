"""diffmine: find what is visually typical of the labels of an image dataset."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffmine.notebook import OpenedRun

__version__ = "0.1.0"


def open_run(uri: str) -> "OpenedRun":
    """Tables and overview of a run folder, for notebooks; see `diffmine.notebook`."""
    from diffmine.notebook import OpenedRun  # only here: the command line starts without it

    return OpenedRun(uri)
