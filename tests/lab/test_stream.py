"""The command's output and its exit status travel in one stream."""

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
