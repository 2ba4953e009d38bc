"""A cpio archive in the "newc" format, which Linux unpacks as its first root file system."""

import stat


class Archive:
    """Collects files in order; a directory must be added before what is in it. Everything belongs to root."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._inodes = 0

    def directory(self, path: str) -> None:
        self._add(path, stat.S_IFDIR | 0o755)

    def file(self, path: str, data: bytes, *, executable: bool = False) -> None:
        self._add(path, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def symlink(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        self._add(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """The archive with its end mark."""
        self._add("TRAILER!!!", 0)
        return bytes(self._bytes)

    def _add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inodes += 1
        name = path.encode() + b"\0"
        inode, uid, gid, links, mtime, checksum = self._inodes, 0, 0, 1, 0, 0
        on_device = (0, 0)
        fields = (inode, mode, uid, gid, links, mtime, len(data), *on_device, *device, len(name), checksum)
        self._bytes += b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (name, data):
            self._bytes += part
            self._bytes += bytes(-len(self._bytes) % 4)
