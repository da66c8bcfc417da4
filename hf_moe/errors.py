"""What can go wrong, in one line each: the message says what is wrong, where, and what would work."""


class HfMoeError(Exception):
    """Base of every error this package raises on purpose. `exit_code` is the command line's."""

    exit_code = 1


class UsageError(HfMoeError):
    """A request that can't be met as it stands: an impossible option, an output that exists."""

    exit_code = 2


class SourceError(HfMoeError):
    """A source checkpoint that is missing, damaged, unknown or unsafe to read."""


class OutputError(HfMoeError):
    """The output can't be written: read-only, no space left."""


class CertificateError(HfMoeError):
    """The mixture is not the dense function, although its method says that it is."""


class TrainingError(HfMoeError):
    """Training can't go on: a loss or a gradient that is not finite. The last checkpoint is left where it is."""
