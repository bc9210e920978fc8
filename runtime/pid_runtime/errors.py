"""What the runtime raises when its input, not its code, is at fault."""


class InputError(ValueError):
    """What the user gave is at fault; every package has a class of its own below this one.

    The message is one line: what was expected, what came, and how to fix it. Commands print it and
    exit with 2.
    """


class PidRuntimeError(InputError):
    """Bad input to the runtime: a broken bundle, a latent of the wrong shape, no such provider."""


class NotFiniteError(PidRuntimeError):
    """A decode gave NaN or infinity."""
