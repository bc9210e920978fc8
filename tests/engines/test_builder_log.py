"""What is read from the builder's log."""

import pytest

from pid_engines.attentions import Attention
from pid_engines.builder_log import BuilderReport, read_report

LINE = (
    "Name: {}, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], TacticName: {}_0x1, "
    "StreamId: 0, Metadata: {}\n"
)
GEMM = (
    "Name: a_1, LayerType: gemm, Inputs: [ {{ Name: x, Datatype: {}, Format: Linear }}], Constants:"
    " [ {{ Name: w, Datatype: Float }}], Outputs: [], TacticName: stub, StreamId: 0, Metadata: "
    "[ONNX Layer: a][ONNX Layer: w]\n"
)
AFTER = (
    "Name: mul_2, LayerType: kgen, Inputs: [ { Name: y, Datatype: BFloat16 }], Constants: [], "
    "Outputs: [], TacticName: mul, StreamId: 0, Metadata: [ONNX Layer: a]\n"
)
ONE = "[ONNX Layer: a][ONNX Layer: s][ONNX Layer: b]"
MEMORY = "[INFO] Total Activation Memory: 5 bytes\n" * 2 + "[INFO] Total Weights Memory: 7 bytes\n"


@pytest.mark.parametrize(
    ("log", "fused"),
    [
        (LINE.format("_gemm_mha_v2_myl0_1", "_gemm_mha_v2", ONE) * 2, 1),
        (LINE.format("_gemm_mha_v2_myl0_1", "_gemm_mha_v2", ONE), 0),  # in one profile of two
        (LINE.format("gemm_1", "__myelin_CASK_STUB", ONE) * 2, 0),
        (LINE.format("_gemm_mha_v2_myl0_1", "_gemm_mha_v2", "[ONNX Layer: s]") * 2, 0),
        (LINE.format("_gemm_mha_v2_myl0_1", "_gemm_mha_v2", ONE.replace("s", "t")) * 2, 0),
        (
            LINE.format("_gemm_mha_v2_myl0_1", "_gemm_mha_v2", ONE) * 2
            + LINE.format("softmax_2", "__myl_Max", "[ONNX Layer: s]"),
            0,
        ),
        ("", 0),
    ],
)
def test_fused_attention_is_read_from_the_log(log: str, fused: int) -> None:
    report = read_report(MEMORY + log, [Attention("s", ("a", "b"))], [], profiles=2)
    assert report == BuilderReport(7, (5, 5), fused, ())


@pytest.mark.parametrize("log", ["", MEMORY * 2, MEMORY.replace("Weights", "Other")])
def test_a_log_without_the_memory_is_refused(log: str) -> None:
    assert "expected the builder to report the memory of 2 profiles" in str(
        read_report(log, [], [], 2)
    )


@pytest.mark.parametrize(
    ("log", "others"),
    [
        (GEMM.format("FP8") * 2 + AFTER, ()),  # what scales the result reads something else
        (GEMM.format("FP8"), ("a",)),  # in one profile of two
        (GEMM.format("FP8") + GEMM.format("BFloat16"), ("a",)),
        ("", ("a",)),
        (LINE.format("_gemm_mha_v2_myl0_1", "_gemm_mha_v2", ONE) * 2, ("a",)),  # of no numbers
    ],
)
def test_products_of_8_bit_numbers_are_read_from_the_log(log: str, others: tuple[str, ...]) -> None:
    report = read_report(MEMORY + log, [], ["a"], profiles=2)
    assert isinstance(report, BuilderReport) and report.products_not_fp8 == others
