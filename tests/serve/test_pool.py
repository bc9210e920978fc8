"""Worker processes: what they do with tasks, and what happens when they end."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from fakes.sessions import OpenFake
from pid_runtime.errors import PidRuntimeError
from pid_serve.pool import Pool, QueueFullError, WorkerLostError
from serving import wait_until

Words = Pool[str, tuple[str, int]]


@contextlib.contextmanager
def pool(opener: OpenFake | None = None, workers: int = 1, **options: Any) -> Generator[Words]:
    opened = Words([opener or OpenFake()] * workers, **options)
    with contextlib.closing(opened):
        yield opened


async def all_of(words: Words, *tasks: str) -> list[Any]:
    """Results or errors of tasks that are queued while the worker sleeps."""
    first = asyncio.create_task(words.run("sleep"))
    while words.waiting or not words.ready:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    others = [asyncio.create_task(words.run(task)) for task in tasks]
    found = await asyncio.gather(first, *others, return_exceptions=True)
    return found[1:]


def test_results_news_and_errors() -> None:
    news: list[str] = []

    async def run(words: Words) -> None:
        assert await words.run("a", news.append) == ("a", 1)
        with pytest.raises(PidRuntimeError, match="expected another task"):
            await words.run("refuse")
        assert words.restarts == 0
        with pytest.raises(RuntimeError, match="the worker failed"):
            await words.run("break")  # and the process is another one from then on
        assert await words.run("b") == ("b", 1)

    with pool() as words:
        assert words.about == "a fake" and words.ready == words.size == 1
        assert words.memory_bytes() > 2**20
        asyncio.run(run(words))
        assert words.restarts == 1
    assert news == ["a 0", "a 1", "a 2"]
    assert words.ready == 0 and words.pids == []
    with pytest.raises(WorkerLostError):
        asyncio.run(words.run("c"))


def test_a_full_queue() -> None:
    with pool(queue_size=2) as words:
        a, b, c = asyncio.run(all_of(words, "a", "b", "c"))
    assert (a, b) == (("a", 1), ("b", 1)) and isinstance(c, QueueFullError)


def test_tasks_of_one_kind_share_a_batch() -> None:
    with pool(batch=3, kind=len) as words:
        found = asyncio.run(all_of(words, "a", "bb", "c", "d", "e"))
    assert found == [("a", 3), ("bb", 1), ("c", 3), ("d", 3), ("e", 1)]


@pytest.mark.parametrize(("bad", "error"), [("refuse", PidRuntimeError), ("die", WorkerLostError)])
def test_a_task_that_fails_does_not_fail_its_batch(bad: str, error: type[Exception]) -> None:
    with pool(batch=3) as words:
        a, found, c = asyncio.run(all_of(words, "a", bad, "c"))
    assert (a, c) == (("a", 1), ("c", 1)) and isinstance(found, error)


def test_a_worker_that_is_killed_loses_its_own_task() -> None:
    async def run(words: Words) -> None:
        tasks = [asyncio.create_task(words.run(task)) for task in ("sleep", "sleep", "a", "b")]
        await asyncio.sleep(0.2)
        os.kill(words.pids[0], signal.SIGKILL)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in found].count(WorkerLostError) == 1
        assert found[2:] == [("a", 1), ("b", 1)]
        assert words.restarts == 1

    with pool(workers=2) as words:
        asyncio.run(run(words))
        wait_until(lambda: words.ready == 2)


def test_a_worker_that_is_stuck_is_killed_when_nobody_waits_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run(words: Words) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(words.run("stick"), 0.3)
        assert await asyncio.wait_for(words.run("a"), 30) == ("a", 1)
        assert words.restarts == 1

    with pool(patience=0.2) as words:
        asyncio.run(run(words))
    assert "goes on though nobody waits for it, and is killed" in caplog.text


def test_cancelled_tasks_are_left_out_or_ended() -> None:
    async def run(words: Words) -> None:
        news: list[str] = []
        running = asyncio.create_task(words.run("sleep", news.append))
        waiting = asyncio.create_task(words.run("die"))
        while not news:
            await asyncio.sleep(0.01)
        assert words.waiting == 1
        for task in (running, waiting):
            task.cancel()
        await asyncio.wait({running, waiting})
        assert words.waiting == 0
        assert await words.run("a") == ("a", 1)
        assert len(news) < 3 and words.restarts == 0

    with pool() as words:
        asyncio.run(run(words))


def test_a_worker_that_cannot_be_opened(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(PidRuntimeError, match="expected no file"):
        Words([OpenFake(), OpenFake(file)])
    file.unlink()
    with pool(OpenFake(file)) as words:
        file.touch()
        os.kill(words.pids[0], signal.SIGKILL)
        wait_until(lambda: not words.ready and words.restarts > 0 and not words.pids)
        with pytest.raises(WorkerLostError, match="none can be started"):
            asyncio.run(words.run("a"))
        file.unlink()
        wait_until(lambda: words.ready == 1)
        assert asyncio.run(words.run("a")) == ("a", 1)


def test_what_is_queued_is_done_before_the_end() -> None:
    async def run(words: Words) -> list[Any]:
        tasks = [asyncio.create_task(words.run(task)) for task in ("sleep", "a", "b")]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(words.close)
        return await asyncio.gather(*tasks)

    with pool() as words:
        assert asyncio.run(run(words)) == [("sleep", 1), ("a", 1), ("b", 1)]
