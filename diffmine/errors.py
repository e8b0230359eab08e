"""Every error that diffmine raises on purpose; the command turns each into an exit code.

DiffmineError
├── InputError        exit 2: the config, the arguments, the dataset or the model cannot be used; the message says why
│   └── StaleRunError exit 2: the output folder holds a run of another config
├── ImageError        one image cannot be used; becomes a row of `failures`, never ends a run
├── NonFiniteError    exit 1: a loss or a feature became NaN or infinite; names the step or the image
├── StoreError        exit 1: a store, the hub or a disk cannot be read or written, or holds other bytes than it should
└── StageError        exit 1: a stage could not finish; says which one, why, and what to do
    └── StallError    exit 1: nothing came for compute.stall_seconds; says what was waited for, and what is free
"""

from typing import Literal, get_args

FailureReason = Literal[
    "missing",  # no such file, or not readable
    "empty",  # zero bytes
    "format",  # not an image of an allowed format
    "truncated",  # begins like an image, cannot be decoded to the end
    "too_large",  # more pixels or bytes than allowed
    "too_small",  # no latent cell fits
    "aspect",  # longer side over 8 times the shorter
    "non_finite",  # a map or a feature is not a number
]
FAILURE_REASONS: tuple[str, ...] = get_args(FailureReason)


class DiffmineError(Exception):
    """Base of all errors raised on purpose."""


class InputError(DiffmineError):
    """The config, the arguments, the dataset or the model cannot be used."""


class StaleRunError(InputError):
    """The output folder holds a run of another config."""


class ImageError(DiffmineError):
    """One image cannot be used.

    Attributes:
        reason: one of `FAILURE_REASONS`.
        detail: a sentence for the person who looks at the table of failures.
    """

    def __init__(self, reason: FailureReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class NonFiniteError(DiffmineError):
    """A loss or a feature became NaN or infinite."""


class StoreError(DiffmineError):
    """A store, the hub or a disk cannot be read or written, or holds other bytes than it should."""


class StageError(DiffmineError):
    """A stage could not finish."""


class StallError(StageError):
    """Nothing came for too long."""
