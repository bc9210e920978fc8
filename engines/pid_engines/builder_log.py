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
    products_not_fp8: tuple[str, ...]
    """Products that should read 8-bit numbers, and do not in every profile."""


def read_report(
    log: str, attentions: Sequence[Attention], products: Sequence[str], profiles: int
) -> BuilderReport | str:
    """What the builder's verbose log says of an engine, or what is missing in it.

    products: of 8-bit numbers, by node. The log has a number of bytes for each profile in turn. The
    kernels are listed in lines "Name: .., LayerType: .., Inputs: [ { .., Datatype: FP8, .. } ],
    Constants: .., TacticName: .., Metadata: [ONNX Layer: NODE]..", each with the nodes that it
    computes: an attention is fused if each profile has a kernel of an attention's tactic
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
    kernels = [_Kernel.read(*parts) for parts in _KERNEL.findall(log)]
    fused = 0
    for attention in attentions:
        parts = {attention.softmax, *attention.products}
        whole = [
            kernel.is_attention and parts <= kernel.nodes
            for kernel in kernels
            if attention.softmax in kernel.nodes
        ]
        fused += len(whole) >= profiles and all(whole)
    others: list[str] = []
    for product in products:
        fp8 = [k.reads_fp8 for k in kernels if k.multiplies and product in k.nodes]
        if len(fp8) < profiles or not all(fp8):
            others.append(product)
    return BuilderReport(int(weights[0]) + max(kept, default=0), scratch, fused, tuple(others))


_KERNEL = re.compile(
    r"^Name: .*?, LayerType: (\w+), Inputs: (\[.*?\]), Constants:.*?"
    r"TacticName: ([^,]*),.* Metadata:(.*)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class _Kernel:
    """A kernel of an engine."""

    is_attention: bool
    multiplies: bool
    reads_fp8: bool
    """Whether all that it reads is 8-bit numbers."""
    nodes: frozenset[str]
    """Of the graph, that it computes."""

    @classmethod
    def read(cls, layer: str, inputs: str, tactic: str, nodes: str) -> "_Kernel":
        is_attention = "mha" in tactic
        return cls(
            is_attention,
            is_attention or layer == "gemm",
            set(re.findall(r"Datatype: (\w+)", inputs)) == {"FP8"},
            frozenset(re.findall(r"\[ONNX Layer: ([^\]]*)\]", nodes)),
        )
