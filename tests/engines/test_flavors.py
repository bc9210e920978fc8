"""GPUs that the builders of both libraries build for."""

import pytest

from pid_engines import flavors
from pid_engines.errors import BuildInputError
from pid_engines.flavors import parse_targets
from pid_runtime.bundle.flavors import FLAVORS


def test_targets_of_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavors, "gpu_target", lambda: "sm90")
    trt, rtx = FLAVORS["tensorrt"], FLAVORS["tensorrt-rtx"]
    assert parse_targets(None, trt) == parse_targets("sm90", trt) == ("sm90",)
    assert parse_targets("current", trt) == ("sm90",)
    assert parse_targets(None, rtx) == ("sm86", "sm89", "sm120")
    assert parse_targets(" sm120, sm86", rtx) == ("sm86", "sm120")
    with pytest.raises(
        BuildInputError, match=r"for the GPU that is there \(sm90\), but got 'sm89'"
    ):
        parse_targets("sm89", trt)
    with pytest.raises(BuildInputError, match="but got 'sm90'"):
        parse_targets("current", rtx)
