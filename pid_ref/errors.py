"""What the reference raises when its input, not its code, is at fault."""


class PidInputError(ValueError):
    """Bad input to the reference: an unknown space, a wrong checkpoint, an impossible size.

    The message is one line (a list of tensors may follow it): what was expected, what came,
    and how to fix it.
    """
