"""The same application on Ray Serve: replicas with decoders, and an ingress that speaks HTTP."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from fastapi import FastAPI
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.exceptions import (  # pyright: ignore[reportMissingImports]
    RayActorError,
    RayTaskError,
)
from ray.serve.exceptions import (  # pyright: ignore[reportMissingImports]
    BackPressureError,
)

from pid_runtime.command.spread import LOCAL, connect
from pid_runtime.errors import PidRuntimeError
from pid_serve.app import Limits, make_app
from pid_serve.pool import CancelledError, QueueFullError, WorkerLostError, portable
from pid_serve.sessions import About, DecodeTask, Made, OpenDecoder, Step, about_of

APP = "pid-serve"
"""What the application is called in Ray Serve."""

_TRIES = 3
"""How often a task is given to a replica, of which each before the last one died with it."""


@dataclass(frozen=True)
class Cluster:
    """Where it runs."""

    address: str
    """Of a Ray cluster, or `LOCAL` for one on this machine, for as long as this runs."""
    replicas: int | None
    """Of each model; None for as many as the load wants."""
    host: str
    port: int


class Replica:
    """A decoder in a process of Ray's."""

    def __init__(self, opener: OpenDecoder, batch: int) -> None:
        self._session = opener()
        self._thread = ThreadPoolExecutor(1)  # a decoder does one thing at a time
        self._batch = batch
        self._batched.set_max_batch_size(batch)

    async def decode(self, task: DecodeTask) -> Made:
        """What came of a task; if this is cancelled, it ends after its next step."""
        if self._batch > 1:
            return await self._batched(task)
        (made,) = await self._run([task], lambda news: None)
        return made

    async def stream(self, task: DecodeTask) -> AsyncIterator[Step | Made]:
        """The steps of a task, then what came of it."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Step | None]()

        def report(steps: Sequence[Step]) -> None:
            loop.call_soon_threadsafe(news.put_nowait, steps[0])

        running = asyncio.create_task(self._run([task], report))
        running.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (step := await news.get()) is not None:
                yield step
            yield (await running)[0]
        finally:
            running.cancel()

    async def _decode_all(self, tasks: list[DecodeTask]) -> list[Any]:
        kinds: dict[Any, list[int]] = {}
        for index, task in enumerate(tasks):
            kinds.setdefault(task.kind(), []).append(index)
        found: list[Any] = [None] * len(tasks)
        for indices in kinds.values():
            try:
                made = await self._run([tasks[index] for index in indices], lambda news: None)
            except PidRuntimeError:  # one of them is at fault
                made = [await self._alone(tasks[index]) for index in indices]
            for index, each in zip(indices, made, strict=True):
                found[index] = each
        return found

    _batched: Any = serve.batch(batch_wait_timeout_s=0.0)(_decode_all)
    """Takes one task, and has `_decode_all` called with what comes together."""

    async def _alone(self, task: DecodeTask) -> Made | Exception:
        try:
            return (await self._run([task], lambda news: None))[0]
        except PidRuntimeError as error:
            return error

    async def _run(
        self, tasks: Sequence[DecodeTask], report: Callable[[Sequence[Step]], None]
    ) -> list[Made]:
        cancelled = threading.Event()

        def pass_on(news: Sequence[Step]) -> None:
            if cancelled.is_set():
                raise CancelledError
            report(news)

        def work() -> list[Made]:
            if cancelled.is_set():
                raise CancelledError
            try:
                return self._session.run(tasks, pass_on)
            except CancelledError:
                raise
            except Exception as error:  # noqa: BLE001  its traceback is for the log alone
                raise portable(error) from None

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except asyncio.CancelledError:
            cancelled.set()
            raise


class Replicas:
    """A model's replicas, as `service.Workers` are used."""

    def __init__(self, name: str, about: About, most: int) -> None:
        """most: tasks that wait or run at most."""
        self.about = about
        self.observe: Callable[[str, float], None] = lambda stage, seconds: None
        self.restarts = 0
        """How often a replica died with a task."""
        self.waiting = 0
        """Tasks that wait or run."""
        self._name, self._most = name, most
        self._handle: Any = None

    async def run(self, task: DecodeTask, report: Callable[[Step], None] | None = None) -> Made:
        """As `Pool.run`, but a task whose replica died is given to another."""
        if self.waiting >= self._most:
            raise QueueFullError
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._name, APP)
        self.waiting += 1
        try:
            for _ in range(_TRIES):
                try:
                    return await self._tried(task, report)
                except RayActorError:
                    self.restarts += 1
            raise WorkerLostError("every replica that took this died")
        except BackPressureError:
            raise QueueFullError from None
        except RayTaskError as error:
            raise error.cause from None  # whose text has no traceback
        finally:
            self.waiting -= 1

    async def _tried(self, task: DecodeTask, report: Callable[[Step], None] | None) -> Made:
        if report is None:
            found = await self._handle.decode.remote(task)
            if isinstance(found, Exception):
                raise found
            return found
        async for news in self._handle.options(stream=True).stream.remote(task):
            if isinstance(news, Made):
                return news
            report(news)
        raise WorkerLostError("a replica ended without an image")

    @property
    def ready(self) -> int:
        """How many replicas run."""
        return self._states().get("RUNNING", 0)

    @property
    def size(self) -> int:
        """How many replicas there are to be."""
        return sum(self._states().values())

    def memory_bytes(self) -> int:
        """Unknown here: Ray tells it."""
        return 0

    def close(self) -> None:
        """Nothing: Ray ends the replicas."""

    def _states(self) -> Mapping[str, int]:
        found = serve.status().applications[APP].deployments[self._name].replica_states
        return {str(getattr(state, "value", state)): count for state, count in found.items()}


def start(
    cluster: Cluster,
    openers: Mapping[str, OpenDecoder],
    queue: int,
    batch: int,
    limits: Limits,
    token: str | None,
) -> None:
    """Deploy models by name, and wait until they can be asked.

    Raises `PidRuntimeError` when the cluster cannot be had or the models do not start.
    """
    connect(cluster.address)
    serve.start(http_options={"host": cluster.host, "port": cluster.port})
    abouts = {name: about_of(opener) for name, opener in openers.items()}

    def build() -> FastAPI:
        models = {name: Replicas(name, about, queue) for name, about in abouts.items()}
        return make_app(models, limits, token)

    replicas = [
        serve.deployment(Replica)
        .options(name=name, **_options(opener, cluster.replicas, queue, batch))
        .bind(_for_replica(opener), batch)
        for name, opener in openers.items()
    ]
    ingress = serve.deployment(serve.ingress(build)()).options(
        name="ingress",
        max_ongoing_requests=limits.bodies + 64,
        ray_actor_options={"num_cpus": 0},
    )
    try:
        serve.run(ingress.bind(*replicas), name=APP, route_prefix="/")
    except RuntimeError as error:
        raise PidRuntimeError(
            "expected the replicas to start, but they did not; see serve status and Ray's logs"
        ) from error


def stop(cluster: Cluster) -> None:
    """Take the application away, and the cluster if it is this process's own."""
    with contextlib.suppress(Exception):  # whatever is left, Ray has said
        serve.delete(APP)
        if cluster.address == LOCAL:
            serve.shutdown()
    ray.shutdown()


def _options(opener: OpenDecoder, replicas: int | None, queue: int, batch: int) -> dict[str, Any]:
    needed = {"num_gpus": 1} if _is_on_gpu(opener) else {"num_cpus": opener.threads or 1}
    options: dict[str, Any] = {
        # All that may wait: what no replica takes, Ray offers again after up to half a second.
        "max_ongoing_requests": max(queue, 2 * batch),
        "ray_actor_options": needed,
    }
    if replicas is not None:
        return options | {"num_replicas": replicas}
    scaling = {"min_replicas": 1, "max_replicas": 100, "target_ongoing_requests": batch}
    return options | {"autoscaling_config": scaling}


def _for_replica(opener: OpenDecoder) -> OpenDecoder:
    # Ray shows every replica its own GPU only.
    return replace(opener, device="cuda:0") if _is_on_gpu(opener) else opener


def _is_on_gpu(opener: OpenDecoder) -> bool:
    return str(opener.device).startswith("cuda")
