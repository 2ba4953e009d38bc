"""Takes from this process what serving a device does not need: new privileges, files, programs, connections.

Whoever breaks out of a device finds the fds that are open, and little else. Made of what the kernel has: Landlock
(since 5.13), seccomp. File descriptors that are open already are not concerned, nor are threads that run already.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

PR_SET_NO_NEW_PRIVS = 38
SECCOMP, SECCOMP_SET_MODE_FILTER = 317, 1
SECCOMP_FLAGS = 1 | 4
"""All threads; and without the slow mitigation that a filter would switch on."""
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION_FLAG, LANDLOCK_PATH_BENEATH = 1, 1
FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Landlock version -> how many kinds of access to files it knows; later ones know no more."""
EXECUTE, READ_FILE, READ_DIR, REMOVE_FILE = 1 << 0, 1 << 2, 1 << 3, 1 << 5
READ = EXECUTE | READ_FILE | READ_DIR
TCP = 3
"""To bind and to connect, which Landlock 4 knows."""
AUDIT_ARCH_X86_64 = 0xC000003E
X32 = 0x40000000
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000

CALLS = """
    mmap 9 mprotect 10 munmap 11 brk 12 mremap 25 msync 26 madvise 28 memfd_create 319
    read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 lseek 8 ioctl 16 pread64 17 pwrite64 18 readv 19 writev 20
    access 21 dup 32 dup2 33 fcntl 72 flock 73 fsync 74 fdatasync 75 ftruncate 77 getdents 78 getcwd 79 unlink 87
    readlink 89 getdents64 217 fadvise64 221 openat 257 newfstatat 262 unlinkat 263 readlinkat 267 faccessat 269
    sync_file_range 277 fallocate 285 dup3 292 preadv 295 pwritev 296 copy_file_range 326 preadv2 327 pwritev2 328
    statx 332 io_uring_setup 425 io_uring_enter 426 io_uring_register 427 close_range 436 faccessat2 439
    accept 43 sendto 44 recvfrom 45 sendmsg 46 recvmsg 47 shutdown 48 getsockname 51 getpeername 52 setsockopt 54
    getsockopt 55 accept4 288 recvmmsg 299 sendmmsg 307
    poll 7 pipe 22 select 23 nanosleep 35 futex 202 epoll_create 213 restart_syscall 219 clock_nanosleep 230
    epoll_wait 232 epoll_ctl 233 pselect6 270 ppoll 271 epoll_pwait 281 timerfd_create 283 eventfd 284
    timerfd_settime 286 timerfd_gettime 287 eventfd2 290 epoll_create1 291 pipe2 293 epoll_pwait2 441 futex_waitv 449
    rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 sched_yield 24 getpid 39 clone 56 exit 60 uname 63
    gettimeofday 96 getrusage 98 sysinfo 99 getuid 102 getgid 104 geteuid 107 getegid 108 sigaltstack 131 prctl 157
    arch_prctl 158 gettid 186 sched_getaffinity 204 set_tid_address 218 clock_gettime 228 clock_getres 229
    exit_group 231 tgkill 234 set_robust_list 273 prlimit64 302 getcpu 309 getrandom 318 membarrier 324 rseq 334
    clone3 435
"""
"""What may be called, with the numbers of x86-64: memory, files, sockets, waiting, threads. Everything else fails as if
the kernel did not have it, so that C libraries try something older."""
ALLOWED = sorted(int(word) for word in CALLS.split() if word.isdecimal())

_libc = ctypes.CDLL(None, use_errno=True)


def enter(sockets: Iterable[Path]) -> list[str]:
    """Take it all away, for good; return what could not be, one line each.

    Python's own modules may still be read, and the `sockets` removed. Call it before there are other threads.
    """
    if platform.machine() != "x86_64":
        return [f"none on {platform.machine()}"]
    missing = []
    for what, step in (
        ("no_new_privs", lambda: _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)),
        ("Landlock", lambda: _restrict_files(_modules(), {path.absolute().parent for path in sockets})),
        ("seccomp", _restrict_calls),
    ):
        try:
            step()
        except OSError as error:
            missing.append(f"without {what}: {error.strerror}")
    return missing


def _modules() -> set[Path]:
    """Where Python and its libraries are. Not where it was started: that is the user's."""
    paths = {
        Path(path).absolute() for path in (*sys.path, sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64") if path
    }
    return {path for path in paths if path.exists()} - {Path.cwd()}


def _restrict_files(readable: set[Path], shared: set[Path]) -> None:
    version = _system(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION_FLAG)
    handled = (1 << FS_RIGHTS[min(version, max(FS_RIGHTS))]) - 1
    attributes = struct.pack("<Q", handled) + (struct.pack("<Q", TCP) if version >= 4 else b"")
    ruleset = _system(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path in readable:
            _allow(ruleset, path, READ if path.is_dir() else READ_FILE)
        for path in shared:
            _allow(ruleset, path, REMOVE_FILE)
        _system(LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _system(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_PATH_BENEATH, struct.pack("<Qi", access, fd), 0)
    finally:
        os.close(fd)


def _restrict_calls() -> None:
    code = filter_program()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("<H6xQ", len(code) // 8, ctypes.addressof(buffer))
    _system(SECCOMP, SECCOMP_SET_MODE_FILTER, SECCOMP_FLAGS, program)


def filter_program() -> bytes:
    """Instructions of classic BPF over `struct seccomp_data`: the number of the call at 0, the architecture at 4."""
    count = len(ALLOWED)
    steps = [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH_X86_64), (RETURN, 0, 0, KILL)]
    steps += [(LOAD, 0, 0, 0), (JUMP_IF_AT_LEAST, count, 0, X32)]
    steps += [(JUMP_IF_EQUAL, count - index, 0, number) for index, number in enumerate(ALLOWED)]
    steps += [(RETURN, 0, 0, FAIL | errno.ENOSYS), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


def _system(number: int, *arguments: int | bytes | None) -> int:
    return _call("syscall", number, *arguments)


def _call(name: str, *arguments: int | bytes | None) -> int:
    wide = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = int(getattr(_libc, name)(*wide))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
