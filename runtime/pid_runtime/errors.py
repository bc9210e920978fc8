"""What the runtime raises when its input, not its code, is at fault."""


class PidRuntimeError(ValueError):
    """Bad input to the runtime: a broken bundle, a latent of the wrong shape, an unknown provider.

    The message is one line: what was expected, what came, and how to fix it.
    """
