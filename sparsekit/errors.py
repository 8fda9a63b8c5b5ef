"""What sparsekit raises beside ValueError, which stands for a caller's mistake."""


class SparsekitError(Exception):
    """Base of the errors below."""


class Unsupported(SparsekitError, RuntimeError):
    """This machine, model or weight cannot do what was asked; the message says what to do instead."""


class PatternError(SparsekitError, ValueError):
    """Weights break the pattern they were said to obey."""


class CheckpointError(SparsekitError, RuntimeError):
    """A checkpoint is missing a part, truncated, or altered."""


class NonFiniteError(SparsekitError, ValueError):
    """Weights or activations hold NaN or infinity."""
