"""The command's output and its exit status travel in one stream."""

import os
import time

import pytest

from pyvirtio.lab.machine import Stream

MARK = b"\0lab 0123"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_the_status_is_told_from_the_output_however_the_stream_is_cut(size: int) -> None:
    output: list[bytes] = []
    stream = Stream(MARK, output.append)
    sent = b"one\0two\0lab 01 no mark" + MARK + b" 17\n"
    for at in range(0, len(sent), size):
        assert stream.status is None
        stream.feed(sent[at : at + size])
    assert b"".join(output) == b"one\0two\0lab 01 no mark"
    assert stream.status == 17


def test_a_line_is_passed_on_at_once() -> None:
    output: list[bytes] = []
    Stream(MARK, output.append).feed(b"a prompt without an end")
    assert output == [b"a prompt without an end"]


def test_a_stream_that_ends_without_its_mark_is_passed_on_whole() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"half a mark" + MARK[:4])
    os.close(writer)
    output: list[bytes] = []
    stream = Stream(MARK, output.append)
    assert stream.read(reader, time.monotonic() + 60)
    os.close(reader)
    assert b"".join(output) == b"half a mark" + MARK[:4]
    assert stream.status is None


def test_a_deadline_ends_the_reading() -> None:
    reader, writer = os.pipe()
    assert not Stream(MARK, lambda data: None).read(reader, time.monotonic())
    os.close(reader)
    os.close(writer)
