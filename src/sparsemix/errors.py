"""The ways a command can fail; light, so that the command line can name them before anything else loads."""


class ConfigError(ValueError):
    """What a user can cause and mend: one line that names the setting, its value, the rule and the way out."""


class RunBusyError(ConfigError):
    """Another process trains the same run just now."""


class DamagedError(ConfigError):
    """A file is not what was written, so that what it stands for cannot go on or be read. It concerns one run alone."""


class OutOfMemoryError(ConfigError):
    """What is asked for needs more memory than there is. It concerns one run alone."""


# What the first line of a run's error says where its training diverged.
DIVERGED = "non-finite loss or gradient"


class TrainingError(RuntimeError):
    """Training cannot go on; what there is has been saved."""
