"""What is round a trace: torch is quiet, not interrupted, and does nothing twice."""

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import signal
import threading
import typing
import warnings
from collections.abc import Callable, Generator
from typing import Any
from unittest.mock import patch


@contextlib.contextmanager
def tracing() -> Generator[None, None, None]:
    """Let torch trace: Ctrl-C and SIGTERM wait until the block ends."""
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    with contextlib.ExitStack() as stack:
        stack.enter_context(_interrupts_held())
        stack.callback(quiet.setLevel, level)
        quiet.setLevel(logging.ERROR)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for holder, name, instead in _shortcuts():
            stack.enter_context(patch.object(holder, name, instead))
        yield


@contextlib.contextmanager
def _interrupts_held() -> Generator[None, None, None]:
    """Let signals wait.

    torch calls Python back from C++ when it traces, and a `KeyboardInterrupt` raised there may end
    the process with an abort, or be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _kept(make: Callable[..., Any]) -> Any:
    """Copies of the table of how to write operations in ONNX, which is made once."""
    made: dict[str, Any] = {}

    def copied(*arguments: Any, **options: Any) -> Any:
        key = repr((arguments, options))
        if key not in made:
            made[key] = make(*arguments, **options)
        table = copy.copy(made[key])
        table.functions = {target: list(known) for target, known in table.functions.items()}
        return table

    return staticmethod(copied)


def _silent(say: Any) -> Any:
    """The same, or nothing where nobody wants to read it."""
    return say if say.__self__.isEnabledFor(logging.DEBUG) else lambda *_: None


def _known(interpreter: Any) -> Any:
    """The same, but of a node that is as it was it takes the value that is known already."""
    from torch.fx.traceback import get_current_meta

    run_changed = interpreter._run_node_and_set_meta  # where there is none, all are run

    class Known(interpreter):
        anew = False

        def _run_node_and_set_meta(self, node: Any) -> Any:
            self.anew = True
            try:
                return run_changed(self, node)
            finally:
                self.anew = False

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            value = None if self.anew else get_current_meta().get("val")
            return super().call_function(target, args, kwargs) if value is None else value

    return Known


_SHORTCUTS: dict[str, Callable[[Any], Any]] = {
    # A fifth of a trace's time each: the table is made for every graph, and results of operators
    # are kept, of which a stage has few twice.
    "torch.onnx._internal.exporter._registration:ONNXRegistry.from_torchlib": _kept,
    "torch._dynamo.config:fake_tensor_cache_enabled": lambda _: False,
    # A tenth: a million times it is asked whether to log the arithmetic of sizes.
    "torch.fx.experimental.sym_node:sym_node_log.debug": _silent,
    "torch.fx.experimental.symbolic_shapes:ShapeEnv._create_fx_call_function": inspect.unwrap,
    # A twentieth each: all operators are looked at, twice in every graph, and given new functions,
    # whose annotations are made then.
    "torch._export.utils:_materialize_cpp_cia_ops": functools.cache,
    "torch._ops:Callable": lambda _: typing.Callable,
    # A twelfth: whether to convert types, nodes are run once more.
    "torch.onnx._internal.fx.passes.type_promotion:_TypePromotionInterpreter": _known,
    # A twentieth: where a node comes from is kept, which no graph of ours says, and every module
    # on the way is compiled, though most of them never run.
    "torch.fx.config:do_not_emit_stack_traces": lambda _: True,
    "torch.fx._lazy_graph_module:_use_lazy_graph_module_flag": lambda _: True,
}
"""What torch does again and again when it traces, and what makes of it something to do instead.

None of it is promised: where a torch does not have it, it is left alone.
"""


@functools.cache
def _shortcuts() -> list[tuple[Any, str, Any]]:
    """Whose attribute to set while torch traces, its name, and to what."""
    found: list[tuple[Any, str, Any]] = []
    for place, instead in _SHORTCUTS.items():
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        try:
            holder: Any = functools.reduce(getattr, owners, importlib.import_module(module))
            found.append((holder, name, instead(getattr(holder, name))))
        except (ImportError, AttributeError):
            continue
    return found
