"""The event loop."""

from __future__ import annotations

import os
import threading

import pytest

from kvik.vmm.loop import EventLoop, IoThread


def test_descriptors_timers_and_calls_are_served_in_one_thread() -> None:
    loop = EventLoop()
    readable, writable = os.pipe()
    seen: list[object] = []
    loop.add_reader(readable, lambda: seen.append(os.read(readable, 10)))
    loop.call_later(0.01, loop.stop)
    loop.call_later(0.0, lambda: seen.append("timer"))
    loop.call_later(0.0, lambda: seen.append("cancelled")).cancel()
    loop.call_soon(lambda: os.write(writable, b"x") and None)
    assert not loop.in_loop()
    loop.run()
    assert b"x" in seen and "timer" in seen and "cancelled" not in seen
    loop.close()
    os.close(readable)
    os.close(writable)


def test_a_callback_may_remove_another_of_the_same_round() -> None:
    loop = EventLoop()
    pipes = [os.pipe() for _ in range(2)]
    seen = []

    def first(mine: int, other: int) -> None:
        seen.append(mine)
        loop.remove_reader(other)
        loop.remove_reader(mine)

    for mine, other in (pipes, pipes[::-1]):
        loop.add_reader(mine[0], lambda mine=mine, other=other: first(mine[0], other[0]))
        os.write(mine[1], b"x")
    loop.run_once(1)
    assert len(seen) == 1
    loop.close()


def test_readers_and_writers_of_one_descriptor_are_apart() -> None:
    import socket

    loop = EventLoop()
    one, two = socket.socketpair()
    seen: list[str] = []

    def writable() -> None:
        seen.append("w")
        loop.remove_writer(one.fileno())

    def readable() -> None:
        seen.append("r")
        one.recv(10)

    loop.add_writer(one.fileno(), writable)
    loop.add_reader(one.fileno(), readable)
    two.send(b"x")
    for _ in range(3):
        loop.run_once(0)
    assert sorted(seen) == ["r", "w"]
    one.close()
    loop.remove_reader(99999)  # unknown: no harm
    loop.close()


def test_an_error_in_a_callback_goes_to_who_wants_it() -> None:
    loop = EventLoop()
    loop.call_soon(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.run_once()
    seen: list[BaseException] = []
    loop.on_error = seen.append
    loop.call_soon(lambda: 1 / 0)
    loop.run_once()
    assert isinstance(seen[0], ZeroDivisionError)
    loop.close()


def test_calls_from_many_threads_all_arrive() -> None:
    loop = EventLoop()
    seen: list[int] = []

    def caller(number: int) -> None:
        for index in range(200):
            loop.call_soon(lambda index=index: seen.append(number * 1000 + index))

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop.call_soon(loop.stop)
    loop.run()
    assert len(seen) == 800
    loop.close()


def test_an_io_thread_runs_calls_and_ends() -> None:
    thread = IoThread("io")
    thread.start()
    seen: list[bool] = []
    thread.call(lambda: seen.append(thread.loop.in_loop()))
    with pytest.raises(ValueError, match="from there"):
        thread.call(lambda: (_ for _ in ()).throw(ValueError("from there")))
    thread.stop()
    assert seen == [True] and thread.thread_id > 0


def test_an_edge_is_heard_once_for_each_addition_and_needs_no_reading() -> None:
    loop = EventLoop()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    heard: list[int] = []
    loop.add_reader(fd, lambda: heard.append(1), edge=True)
    for rounds in range(3):
        os.eventfd_write(fd, 1)
        loop.run_once(0)
        loop.run_once(0)
        assert len(heard) == rounds + 1
    assert os.eventfd_read(fd) == 3
    loop.remove_reader(fd)
    os.eventfd_write(fd, 1)
    loop.add_reader(fd, lambda: heard.append(2))
    loop.run_once(0)
    loop.run_once(0)
    assert heard[3:] == [2, 2]
    os.close(fd)
    loop.close()


def test_more_descriptors_than_one_round_takes_are_all_served() -> None:
    loop = EventLoop()
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(100)]
    heard = set()
    for fd in fds:
        loop.add_reader(fd, lambda fd=fd: heard.add(fd))
    for _ in range(4):
        loop.run_once(0)
    assert heard == set(fds)
    for fd in fds:
        loop.remove_reader(fd)
        os.close(fd)
    loop.close()
