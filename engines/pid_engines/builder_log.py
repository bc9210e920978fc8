"""What the builder's log says of an engine: its memory, and whether its attention is fused."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pid_engines.attentions import Attention


@dataclass(frozen=True)
class BuilderReport:
    """What the builder says about an engine."""

    weights_bytes: int
    """Device memory that lasts: weights, and what kernels keep."""
    scratch_bytes: tuple[int, ...]
    """Device memory of an execution, per optimisation profile."""
    attentions_fused: int
    """Attentions that are one kernel in every profile."""


def read_report(log: str, attentions: Sequence[Attention], profiles: int) -> BuilderReport | str:
    """What the builder's verbose log says of an engine, or what is missing in it.

    The log has a number of bytes for each profile in turn. The kernels are listed in lines
    "Name: .., LayerType: .., TacticName: .., Metadata: [ONNX Layer: NODE]..", each with the nodes
    that it computes: an attention is fused if each profile has a kernel of an attention's tactic
    that computes its softmax and both products, and no other kernel computes its softmax.
    """
    scratch = tuple(map(int, re.findall(r"Total Activation Memory: (\d+) bytes", log)))
    weights = re.findall(r"Total Weights Memory: (\d+) bytes", log)
    kept = map(int, re.findall(r"Total Device Persistent Memory: (\d+) bytes", log))
    if len(scratch) != profiles or len(weights) != 1:
        return (
            f"expected the builder to report the memory of {profiles} profiles and of the weights, "
            f"but got {len(scratch)} and {len(weights)} numbers"
        )
    kernels = [
        ("mha" in tactic, set(re.findall(r"\[ONNX Layer: ([^\]]*)\]", nodes)))
        for tactic, nodes in re.findall(
            r"^Name: .*, TacticName: ([^,]*),.* Metadata:(.*)$", log, re.MULTILINE
        )
    ]
    fused = 0
    for attention in attentions:
        parts = {attention.softmax, *attention.products}
        whole = [
            is_attention and parts <= nodes
            for is_attention, nodes in kernels
            if attention.softmax in nodes
        ]
        fused += len(whole) >= profiles and all(whole)
    return BuilderReport(int(weights[0]) + max(kept, default=0), scratch, fused)
