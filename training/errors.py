"""What a user of the trainer can meet, as a tree.

    TrainingError             one sentence: what was found, what was expected, what to do
    ├── ConfigError           the settings contradict each other, the data or the machine
    ├── RunDirectoryError     the run directory is taken, in use or finished
    ├── CheckpointError       a checkpoint is half-written, damaged, foreign or cannot be written
    └── DataError             the folder has nothing to learn from
        └── NoImagesCome      the disk or the network gives no images any more

The command line prints the sentence and leaves with status 2; nothing else of the trainer catches them.
"""


class TrainingError(Exception):
    """Anything that the trainer refuses, with a sentence for the user."""


class ConfigError(TrainingError):
    """The settings contradict each other, the data or the machine."""


class RunDirectoryError(TrainingError):
    """The run directory belongs to another run, is in use, or holds a finished run."""


class CheckpointError(TrainingError):
    """A checkpoint is half-written, damaged, foreign, or cannot be written."""


class DataError(TrainingError):
    """The folder has nothing to learn from."""


class NoImagesCome(DataError):
    """The disk or the network gives no images any more."""
