"""One computation at a time, in order, with a bounded queue."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from perl.server.worker import BusyError, Worker


def test_a_thousand_at_once_are_done_in_order_or_refused() -> None:
    done: list[int] = []
    at_once = threading.Lock()

    def work(number: int) -> int:
        assert at_once.acquire(blocking=False), "one at a time"
        done.append(number)
        at_once.release()
        return number

    async def ask_all() -> list[int | BaseException]:
        worker, gate = Worker(places=100), threading.Event()
        first = asyncio.create_task(worker.run(gate.wait))
        await asyncio.sleep(0)
        asked = [asyncio.create_task(worker.run(lambda n=n: work(n))) for n in range(1_000)]  # type: ignore[misc]
        await asyncio.sleep(0)
        gate.set()
        assert await first
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert await worker.run(lambda: 5) == 5, "there is room again"
        worker.close()
        return answers

    answers = asyncio.run(ask_all())
    assert answers[:99] == done == list(range(99))
    assert all(isinstance(answer, BusyError) for answer in answers[99:])


def test_a_stream_gives_pieces_ends_with_its_error_and_stops_when_nobody_listens() -> None:
    made: list[int] = []

    def pieces() -> Iterator[int]:
        for number in range(1_000_000):
            made.append(number)
            yield number

    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    async def listen() -> None:
        worker = Worker()
        stream = worker.stream(pieces)
        assert [await anext(stream), await anext(stream)] == [0, 1]
        await stream.aclose()
        failing = worker.stream(broken)
        assert await anext(failing) == 1
        with pytest.raises(ValueError, match="broken"):
            await anext(failing)
        worker.close()

    asyncio.run(listen())
    assert len(made) < 1_000_000
