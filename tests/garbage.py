"""The garbage collector, which tests meet with more objects than programs do."""

import gc


def pass_over_what_is_there() -> None:
    """Let the garbage collector pass over all objects of now.

    Modules of torch, diffusers and transformers are millions of them: a collection, which ends
    every command that frees a model, took a third of a second.
    """
    gc.collect()
    gc.freeze()
