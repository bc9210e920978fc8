"""What the paper published: rows of their own, never mixed with what was measured here."""

from pid_bench.cases import Case
from pid_bench.report import Measured, Row

_SOURCE = "published in arXiv 2605.23902, on a GB200"

_PUBLISHED_MS = {
    "PiD": 211.2,
    "VAE + Real-ESRGAN": 62.2,
    "LUA": 369.3,
    "TSD-SR": 724.8,
    "InvSR": 1017.7,
    "SeedVR2": 1237.5,
}
"""Milliseconds from a 512x512 latent to 2048x2048 pixels, by pipeline."""


def reported_rows() -> tuple[Row, ...]:
    """One row per published pipeline."""
    return tuple(
        Row(
            kind="reported",
            case=Case(name, "", "", "", 2048, 2048, "", "cuda", 0, 0, 0, "real"),
            input_size=(512, 512),
            message=_SOURCE,
            measured=Measured(rounds_ms=(milliseconds,)),
        )
        for name, milliseconds in _PUBLISHED_MS.items()
    )
