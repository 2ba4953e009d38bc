"""A RAM disk as a plugin of nbdkit, which `pyvirtio bench --against nbdkit` compares with ours. Not for import."""

API_VERSION = 2

disk = bytearray(1 << 28)


def open(readonly: bool) -> int:
    """One handle is as good as another."""
    return 1


def get_size(handle: int) -> int:
    return len(disk)


def pread(handle: int, buffer: bytearray, offset: int, flags: int) -> None:
    buffer[:] = disk[offset : offset + len(buffer)]


def pwrite(handle: int, buffer: bytearray, offset: int, flags: int) -> None:
    disk[offset : offset + len(buffer)] = buffer
