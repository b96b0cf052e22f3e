"""Runs inside of the sandbox's namespaces: gives up rights, sets limits, then runs the program.

Started as a file by an isolated interpreter, so it uses the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

MEMORY_BYTES = 2**30
FILE_BYTES = 2**24
CPU_SECONDS = 10

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_READING = 0b1101
"""Landlock's rights to execute, read a file and list a folder: bits 0, 2 and 3."""
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}
"""Number of file rights that a version of Landlock knows; 16 since version 5."""

_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2
_CALLS = {
    "x86_64": (0xC000003E, {"clone": 56, "connect": 42, "fork": 57, "vfork": 58}),
    "aarch64": (0xC00000B7, {"clone": 220, "connect": 203}),
}
"""Audit number of an architecture, and the numbers of its system calls."""
_CLONE3, _CLONE_THREAD = 435, 0x10000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _NOT_PERMITTED, _NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x50001, 0x50026


def may_write_only_below(folder: str) -> None:
    """Landlock: read anything, write only in `folder`; for this process and all that it starts."""
    system = ctypes.CDLL(None, use_errno=True)
    version = system.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        sys.exit("this kernel has no Landlock")
    every = (1 << _RIGHTS_BY_VERSION.get(version, 16)) - 1
    ruleset = system.syscall(_CREATE_RULESET, struct.pack("=Q", every), 8, 0)
    for path, rights in (("/", _READING), (folder, every)):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if system.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0):
            sys.exit(f"Landlock refuses a rule: {os.strerror(ctypes.get_errno())}")
        os.close(descriptor)
    if system.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or system.syscall(_RESTRICT_SELF, ruleset, 0):
        sys.exit(f"Landlock cannot be switched on: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


def may_not_fork_or_connect() -> None:
    """Seccomp: threads yes, processes no; no connection either, since local sockets ignore network namespaces.

    Limits on the number of processes do not bind root, hence a filter.
    """
    if platform.machine() not in _CALLS:
        sys.exit(f"the sandbox knows no system call numbers of {platform.machine()}")
    architecture, calls = _CALLS[platform.machine()]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        # the numbers of another calling convention
        (_AT_LEAST, 0, 1, 0x40000000),
        (_RETURN, 0, 0, _KILL),
        # C libraries fall back to clone
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _NO_SUCH_CALL),
    ]
    for name in ("connect", "fork", "vfork"):
        if name in calls:
            program += [(_EQUAL, 0, 1, calls[name]), (_RETURN, 0, 0, _NOT_PERMITTED)]
    program += [
        (_EQUAL, 0, 3, calls["clone"]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _NOT_PERMITTED),
        (_RETURN, 0, 0, _ALLOW),
    ]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(instructions))
    system = ctypes.CDLL(None, use_errno=True)
    if system.prctl(_SET_SECCOMP, _SECCOMP_FILTER, ctypes.c_char_p(header), 0, 0):
        sys.exit(f"seccomp cannot be switched on: {os.strerror(ctypes.get_errno())}")


def limit() -> None:
    """Bound time, memory and files."""
    for what, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    program = sys.argv[1]
    may_write_only_below(os.path.dirname(program))
    may_not_fork_or_connect()
    limit()
    os.execv(sys.executable, [sys.executable, "-I", program])
