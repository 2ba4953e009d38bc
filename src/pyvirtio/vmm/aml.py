"""The few words of ACPI Machine Language that a DSDT needs (ACPI 6.5, chapter 20). Each returns encoded bytes."""

import struct


def name(path: str, value: bytes) -> bytes:
    return b"\x08" + _name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    return b"\x10" + _with_length(_name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    return b"\x5b\x82" + _with_length(_name_string(path) + b"".join(terms))


def package(*elements: bytes) -> bytes:
    return b"\x12" + _with_length(bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    return b"\x11" + _with_length(integer(len(data)) + data)


def integer(value: int) -> bytes:
    if value in (0, 1):
        return bytes([value])
    if value < 1 << 8:
        return struct.pack("<BB", 0x0A, value)
    if value < 1 << 16:
        return struct.pack("<BH", 0x0B, value)
    return struct.pack("<BI", 0x0C, value)


def eisa_id(text: str) -> bytes:
    """A compressed id such as PNP0A03 (20.2.3 EISAID: three letters of 5 bits, four hexadecimal digits)."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | (ord(letter) - 0x40)
    return b"\x0c" + struct.pack(">HH", letters, int(text[3:], 16))


def resources(*descriptors: bytes) -> bytes:
    """A resource template (6.4): the descriptors and an end tag without a checksum."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io_port(base: int, length: int) -> bytes:
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq(number: int) -> bytes:
    """An edge-triggered ISA interrupt."""
    return struct.pack("<BH", 0x22, 1 << number)


def bus_numbers(first: int, last: int) -> bytes:
    return struct.pack("<BHBBB5H", 0x88, 13, 2, 0x0C, 0, 0, first, last, 0, last - first + 1)


def io_window(ports: range) -> bytes:
    return struct.pack("<BHBBB5H", 0x88, 13, 1, 0x0C, 3, 0, ports.start, ports.stop - 1, 0, len(ports))


def memory_window(addresses: range) -> bytes:
    """Not cacheable, read and written."""
    first, last = addresses.start, addresses.stop - 1
    return struct.pack("<BHBBB5I", 0x87, 23, 0, 0x0C, 1, 0, first, last, 0, len(addresses))


def _name_string(path: str) -> bytes:
    root = b"\\" if path.startswith("\\") else b""
    return root + path.lstrip("\\").ljust(4, "_").encode()


def _with_length(body: bytes) -> bytes:
    """PkgLength (20.2.4): it counts itself; one byte up to 63, else 4 bits and a byte or two."""
    if len(body) < 63:
        return bytes([len(body) + 1]) + body
    if len(body) + 2 < 1 << 12:
        total = len(body) + 2
        return bytes([1 << 6 | total & 15, total >> 4]) + body
    total = len(body) + 3
    return bytes([2 << 6 | total & 15, total >> 4 & 255, total >> 12]) + body
