"""A bundle as a model of Triton's Python backend; `pid-triton` writes what loads it.

Runs in Triton's process for the model, and needs the runtime alone.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError

BUNDLE = "bundle"
"""The bundle's folder, beside `model.py`."""

Array = NDArray[Any]


class _CancelledError(Exception):
    """Nobody waits for this batch."""


class _Request(Protocol):
    """Triton's."""

    def is_cancelled(self) -> bool: ...


class TritonPythonModel:
    """What Triton calls, by these names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle, in this instance's process."""
        import triton_python_backend_utils  # pyright: ignore[reportMissingImports]

        self._triton: Any = triton_python_backend_utils
        parameters = {
            name: value["string_value"]
            for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        device = None
        if args["model_instance_kind"] == "GPU":
            device = f"cuda:{args['model_instance_device_id']}"
        folder = Path(args["model_repository"], args["model_version"], BUNDLE)
        threads = parameters.get("threads")
        self._decoder = Decoder.open(
            folder,
            parameters["backend"],
            device,
            threads=None if threads is None else int(threads),
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request; those of one shape are decoded together."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[Any, list[int]] = {}
        inputs = [self._inputs(request) for request in requests]
        for index, each in enumerate(inputs):
            shapes = [
                (name, each[name].shape[1:])
                for name in ("latent", "caption", "negative")
                if name in each
            ]
            sampling = [_first(each, name) for name in ("steps", "guidance")]
            groups.setdefault((*shapes, *sampling), []).append(index)
        for indices in groups.values():
            asking = [requests[index] for index in indices]
            try:
                images = self._decode([inputs[index] for index in indices], asking)
            except Exception as error:  # noqa: BLE001  Triton tells whoever asked
                if len(indices) > 1 and isinstance(error, PidRuntimeError):
                    for index in indices:  # one of them is at fault
                        responses[index] = self._alone(inputs[index], requests[index])
                else:
                    for index in indices:
                        responses[index] = self._refusal(error)
                continue
            for index in indices:
                count = len(inputs[index]["latent"])
                responses[index] = self._response(images[:count])
                images = images[count:]
        return responses

    def finalize(self) -> None:
        """Give the memory back."""
        self._decoder.close()

    def _inputs(self, request: Any) -> dict[str, Array]:
        return {each.name(): each.as_numpy() for each in request.inputs()}

    def _decode(self, inputs: Sequence[dict[str, Array]], requests: Sequence[_Request]) -> Array:
        """Images `[B, H, W, 3]` of requests of one shape."""
        counts = [len(each["latent"]) for each in inputs]

        def joined(name: str) -> Array | None:
            found = [each[name] for each in inputs if name in each]
            return np.concatenate(found) if found else None

        def one_each(name: str) -> list[Any]:
            return [
                value
                for each, count in zip(inputs, counts, strict=True)
                for value in each.get(name, np.zeros(count, np.uint64)).reshape(-1).tolist()
            ]

        def progress(_done: int, _steps: int) -> None:
            if all(request.is_cancelled() for request in requests):
                raise _CancelledError

        steps = _first(inputs[0], "steps")
        return self._decoder.decode(
            np.concatenate([each["latent"] for each in inputs]),
            joined("caption"),
            sigma=one_each("sigma"),
            seed=one_each("seed"),
            steps=None if steps is None else int(steps),
            negative=joined("negative"),
            guidance=_first(inputs[0], "guidance"),
            output="uint8",
            progress=progress,
        )

    def _alone(self, inputs: dict[str, Array], request: _Request) -> Any:
        try:
            return self._response(self._decode([inputs], [request]))
        except Exception as error:  # noqa: BLE001  Triton tells whoever asked
            return self._refusal(error)

    def _response(self, images: Array) -> Any:
        image = self._triton.Tensor("image", np.ascontiguousarray(images))
        return self._triton.InferenceResponse(output_tensors=[image])

    def _refusal(self, error: Exception) -> Any:
        kind: Callable[..., Any] = self._triton.TritonError
        if isinstance(error, _CancelledError):
            refused = kind("cancelled", self._triton.TritonError.CANCELLED)
        elif isinstance(error, PidRuntimeError):
            refused = kind(str(error), self._triton.TritonError.INVALID_ARG)
        else:
            self._triton.Logger.log_error(f"a decode failed: {error!r}")
            refused = kind("the decode failed", self._triton.TritonError.INTERNAL)
        return self._triton.InferenceResponse(error=refused)


def _first(inputs: dict[str, Array], name: str) -> Any:
    """The first number of an input; None where it is left out."""
    return inputs[name].reshape(-1)[0].item() if name in inputs else None
