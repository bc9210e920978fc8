"""Builds one engine in a process of its own, so that a crash of the builder is only its own.

    python -m pid_engines.worker

A `pid_engines.child`: it is asked for a `BuildRequest`, and answers with a `BuildResult`. Parser
and builder write what they have to say to stderr.
"""

import hashlib
import io
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pid_engines.child import PartDone, serve
from pid_engines.errors import BuildError
from pid_engines.flavors import BUILDERS, capability, load_library, load_polygraphy
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
    except OSError as error:  # a full disk, most likely
        file = error.filename or asked["engine"]
        return {"error": str(error), "errno": error.errno, "file": str(file)}


def build(request: BuildRequest, progress: PartDone) -> BuildResult:
    """Build an engine. Raises `BuildError` when the library does not."""
    begin = time.monotonic()
    polygraphy = load_polygraphy(FLAVORS[request.flavor])
    trt = load_library(FLAVORS[request.flavor])
    errors: list[str] = []
    unwritten: list[OSError] = []
    # Polygraphy has one logger for all it makes; its own drops repeated warnings.
    polygraphy.backend.trt.util.TRT_LOGGER = _logger(trt, errors, unwritten)
    builder, network, _ = _network(polygraphy, trt, request, errors)
    difference = port_difference(request.graph, network_ports(network))
    if difference is not None:
        raise BuildError(difference)
    try:
        create = _create_config(polygraphy, trt, request, _monitor(trt, progress))
        config = create(builder, network)
        plan = polygraphy.backend.trt.engine_bytes_from_network((builder, network), config=config)
    except polygraphy.exception.PolygraphyException as error:
        raise BuildError(errors[-1] if errors else " ".join(str(error).split())) from None
    if unwritten:  # without its log nobody knows what the engine is
        raise unwritten[0]
    if request.timing_cache:
        write_whole(Path(request.timing_cache), memoryview(config.get_timing_cache().serialize()))
    content = memoryview(plan)
    write_whole(Path(request.engine), content)
    digest = hashlib.sha256(content).hexdigest()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return BuildResult(plan.nbytes, digest, round(time.monotonic() - begin, 3), peak)


def _network(polygraphy: Any, trt: Any, request: BuildRequest, errors: list[str]) -> Any:
    """Builder, network and parser of the graph.

    Strongly typed: precisions are those of the graph. Newer libraries know nothing else.
    """
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    try:
        return polygraphy.backend.trt.network_from_onnx_path(request.onnx, strongly_typed=typed)
    except polygraphy.exception.PolygraphyException as error:
        telling = [line for line in errors if "---" not in line]  # the rest lists the node
        said = "; ".join(telling) or " ".join(str(error).split())
        raise BuildError(f"cannot parse {request.onnx}: {said}") from None


def _create_config(polygraphy: Any, trt: Any, request: BuildRequest, monitor: Any) -> Any:
    """What makes the builder's configuration, when it is given builder and network."""
    kind = BUILDERS[request.flavor]
    options: dict[str, Any] = {
        "profiles": _profiles(polygraphy, request),
        "builder_optimization_level": request.flags["opt_level"],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # the log then lists the kernels
        "progress_monitor": monitor,
    }
    if request.flags["workspace_bytes"]:
        pool = trt.MemoryPoolType.WORKSPACE
        options["memory_pool_limits"] = {pool: request.flags["workspace_bytes"]}
    if request.timing_cache:
        path = Path(request.timing_cache)
        # Of a path, Polygraphy would leave a lock file in the bundle, which is locked already.
        options["load_timing_cache"] = io.BytesIO(path.read_bytes() if path.exists() else b"")
    if kind.targets:
        options["compute_capabilities"] = [capability(target) for target in request.targets]
        create = polygraphy.backend.tensorrt_rtx.CreateConfigRTX(**options)
    else:
        create = polygraphy.backend.trt.CreateConfig(tf32=True, **options)

    def set_flags(_builder: Any, _network: Any, config: Any) -> None:
        for name, flag in kind.flags:
            if request.flags.get(name):
                config.set_flag(getattr(trt.BuilderFlag, flag))

    return polygraphy.backend.trt.PostprocessConfig(create, set_flags)


def _profiles(polygraphy: Any, request: BuildRequest) -> list[Any]:
    """Polygraphy's profiles; none for a graph whose sizes are fixed."""
    dynamic = {
        name: port.shape
        for name, port in request.graph.inputs.items()
        if any(isinstance(size, str) for size in port.shape)
    }
    if not dynamic:
        return []
    profiles: list[Any] = []
    for sizes in request.profiles:
        profile = polygraphy.backend.trt.Profile()
        for name, shape in dynamic.items():
            profile.add(name, *shape_ranges(shape, sizes))
        profiles.append(profile)
    return profiles


def _logger(trt: Any, errors: list[str], unwritten: list[OSError]) -> Any:
    """A logger that writes to stderr, and keeps errors as one line each.

    unwritten: gets why stderr, a file, could not be written; raised through the library, an
    exception would end the process.
    """

    class Logger(trt.ILogger):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            try:
                sys.stderr.write(f"[{severity.name}] {message}\n")
            except OSError as error:
                unwritten.append(error)
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
