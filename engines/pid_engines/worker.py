"""Builds one engine in a process of its own, so that a crash of the builder is only its own.

    python -m pid_engines.worker

A `pid_engines.child`: it is asked for a `BuildRequest`, and answers with a `BuildResult`. Parser
and builder write what they have to say to stderr.
"""

import hashlib
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pid_engines.child import PartDone, serve
from pid_engines.errors import BuildError
from pid_engines.flavors import BUILDERS, Builder, load_library
from pid_engines.ports import network_ports, port_difference
from pid_engines.profiles import shape_ranges
from pid_runtime.bundle.engines import Profile
from pid_runtime.bundle.files import write_whole
from pid_runtime.bundle.flavors import FLAVORS
from pid_runtime.bundle.json_reader import read_member
from pid_runtime.bundle.manifest import Graph


@dataclass(frozen=True)
class BuildRequest:
    """What to build."""

    flavor: str
    targets: tuple[str, ...]
    """GPU architectures; of a flavour that only builds for the GPU it runs on, that one."""
    flags: dict[str, Any]
    """As in the manifest: opt_level, workspace_bytes and the flavour's own."""
    onnx: str
    """Path of the graph; its weights are beside it."""
    graph: Graph
    """As the manifest describes it."""
    profiles: tuple[Profile, ...]
    engine: str
    """Path of the new file."""
    timing_cache: str
    """Path of the file to read and write measurements in; empty for none."""


@dataclass(frozen=True)
class BuildResult:
    """What was built."""

    bytes: int
    sha256: str
    seconds: float
    peak_rss_bytes: int
    """Most host memory of this process."""


def main() -> int:
    """Build what is asked for; returns the exit code."""
    return serve(_answer)


def _answer(asked: dict[str, Any], progress: PartDone) -> dict[str, Any]:
    try:
        return asdict(build(read_member(BuildRequest, asked, "request"), progress))
    except BuildError as error:
        return {"error": str(error)}


def build(request: BuildRequest, progress: PartDone) -> BuildResult:
    """Build an engine. Raises `BuildError` when the library does not."""
    begin = time.monotonic()
    trt = load_library(FLAVORS[request.flavor])
    errors: list[str] = []
    builder = trt.Builder(_logger(trt, errors))
    network = builder.create_network(_network_flags(trt))
    _parse(trt, builder, network, request)
    difference = port_difference(request.graph, network_ports(network))
    if difference is not None:
        raise BuildError(difference)
    config = builder.create_builder_config()
    _configure(trt, BUILDERS[request.flavor], config, request)
    for profile in request.profiles:
        _add_profile(builder, config, request.graph, profile)
    config.progress_monitor = _monitor(trt, progress)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(errors[-1] if errors else "the builder gave no engine and no reason")
    if request.timing_cache:
        write_whole(Path(request.timing_cache), memoryview(config.get_timing_cache().serialize()))
    content = memoryview(plan)
    write_whole(Path(request.engine), content)
    digest = hashlib.sha256(content).hexdigest()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return BuildResult(plan.nbytes, digest, round(time.monotonic() - begin, 3), peak)


def _network_flags(trt: Any) -> int:
    """Strongly typed: precisions are those of the graph. Newer libraries know nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(trt: Any, builder: Any, network: Any, request: BuildRequest) -> None:
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(request.onnx):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        said = "; ".join(
            " ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}".split())
            for error in found
        )
        raise BuildError(f"cannot parse {request.onnx}: {said}")


def _configure(trt: Any, kind: Builder, config: Any, request: BuildRequest) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the log then lists the kernels
    config.builder_optimization_level = request.flags["opt_level"]
    if request.flags["workspace_bytes"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.flags["workspace_bytes"])
    for name, flag in kind.flags:
        if request.flags.get(name):
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if kind.targets:
        config.num_compute_capabilities = len(request.targets)
        for index, target in enumerate(request.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    if request.timing_cache:
        path = Path(request.timing_cache)
        known = path.read_bytes() if path.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)


def _add_profile(
    builder: Any, config: Any, graph: Graph, sizes: Mapping[str, Sequence[int]]
) -> None:
    dynamic = {
        name: port.shape
        for name, port in graph.inputs.items()
        if any(isinstance(size, str) for size in port.shape)
    }
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name, shape in dynamic.items():
        profile.set_shape(name, *shape_ranges(shape, sizes))
    config.add_optimization_profile(profile)


def _logger(trt: Any, errors: list[str]) -> Any:
    """A logger that writes to stderr, and keeps errors as one line each."""

    class Logger(trt.ILogger):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            sys.stderr.write(f"[{severity.name}] {message}\n")
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                errors.append(" ".join(message.split()))

    return Logger()


def _monitor(trt: Any, progress: PartDone) -> Any:
    """A progress monitor that says how much of the outermost phase is done."""

    class Monitor(trt.IProgressMonitor):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.steps[name] = steps

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.steps:
                try:
                    progress((step + 1) / max(1, self.steps[name]))
                except OSError:  # whoever wanted the engine is gone
                    return False
            return True

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())
