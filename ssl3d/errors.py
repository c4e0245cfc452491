"""The errors that a user can act on: one line each, exit status 2."""


class Ssl3dError(Exception):
    """Root of every error that this toolkit raises on purpose.

    The command line prints the message as one line, without a traceback, and exits with `exit_status`.
    """

    exit_status = 2


class UsageError(Ssl3dError):
    """A flag or an option has a value that cannot be used."""


class DataError(Ssl3dError):
    """A scan, a folder or a store cannot be used."""


class CheckpointError(Ssl3dError):
    """A run folder, a checkpoint or an encoder file cannot be used."""


class PluginError(Ssl3dError):
    """A proxy, an encoder, a benchmark or a command is unknown or does not import."""


class TrainingError(Ssl3dError):
    """Training cannot go on, such as a loss that is not finite."""

    exit_status = 1
