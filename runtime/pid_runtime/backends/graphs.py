"""What a backend offers: a bundle's graphs, loaded once for all decoders and run by each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from pid_runtime.backends.memory import Memory, Tensor
from pid_runtime.bundle.manifest import Bucket, Manifest

Call = Callable[[], None]

PlannedCall = tuple[str, Mapping[str, int]]
"""A kind of call that a decode is going to make: a graph, and the sizes of one image's."""


class Graphs(Protocol):
    """A bundle's graphs as one decoder runs them, in its memory. Serves one thread at a time."""

    whole_batches: bool
    """Whether graphs take all images of a batch in one call, or one image per call."""
    batches_gain: bool
    """Whether two images as a batch may take less time than one after another."""

    def bucket_for(self, tokens: int) -> Bucket:
        """The bucket to decode so many patch tokens in.

        Raises `PidRuntimeError` when there is none.
        """
        ...

    def prepare(self, calls: Iterable[PlannedCall], needed_bytes: int, batch: int) -> None:
        """Make ready for a shape, before its memory is allocated.

        needed_bytes: what is going to be allocated. batch: images of the shape. Raises
        `PidRuntimeError` when a graph cannot run at a size, or when memory is known not to suffice.
        """
        ...

    def bind(self, graph: str, tensors: Mapping[str, Tensor], scratch: Tensor | None) -> Call:
        """A call that runs a graph on these inputs and outputs, by name, as often as wanted.

        scratch: memory the graph may work in, from here to the end of the arena, if it is planned.
        """
        ...

    def sequence(self, name: str, calls: Sequence[Call]) -> Call:
        """A call that makes these calls, bound or copies, in order; `name` is for profilers."""
        ...

    def close(self) -> None:
        """Release what is the decoder's own."""
        ...


class LoadedGraphs(Protocol):
    """A bundle's graphs and weights on one backend, for any number of decoders.

    Constructing one opens no device and reads no weights: `load` does.
    """

    manifest: Manifest
    """The bundle's; when loaded, with the program that is run and its buffers."""

    def load(self) -> None:
        """Open the device and load the graphs. Raises `PidRuntimeError` when that fails."""
        ...

    def memory(self) -> Memory:
        """The memory of one more decoder."""
        ...

    def graphs(self, memory: Memory) -> Graphs:
        """The graphs for the decoder of this memory."""
        ...

    def close(self) -> None:
        """Release graphs and weights; no decoder may be left."""
        ...


def in_order(calls: Sequence[Call]) -> Call:
    """A call that makes these calls in order: the plain `Graphs.sequence`."""

    def run() -> None:
        for call in calls:
            call()

    return run
