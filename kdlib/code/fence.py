"""The inside of the fence: a program of its own that shuts itself in, and then runs what it is given.

`python -I -S -B fence.py REPORT` (kdlib.code.sandbox) reads its order as JSON from standard input and writes
to the file descriptor REPORT.  Standard library alone, and nothing of kdlib.  Three processes: this one
makes the namespaces; its child is the first in them, so that when it ends the kernel ends all others
there; the grandchild drops what rights are left, and runs the program.  Whatever part of the fence cannot be
had, the program does not run.

Namespaces(7), mount_setattr(2), pivot_root(2), seccomp(2), getrlimit(2).
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import types

NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
ANY_NEW = 0x7E020000  # of clone(2): a namespace of any kind
NOSUID, NODEV, BIND, PRIVATE = 2, 4, 4096, 1 << 18
RECURSIVE, DETACH = 1 << 14, 2
SET_ATTR, HERE, ALL_BELOW = 442, -100, 0x8000  # mount_setattr(2), on all machines
READ_ONLY, NO_SETUID, NO_DEVICES = 1, 2, 4
DEATH_SIGNAL, NO_NEW_RIGHTS, SECCOMP, FILTER = 1, 38, 22, 2
UNUSED = 1 << 30  # from here on no system has users

SHOWN = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")  # beside Python's own folder, read-only
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
STAGE = "/proc"  # where the new root is put together: any folder that holds nothing of what is shown
HOME = "/tmp"

MACHINES = {  # AUDIT_ARCH, where x32's numbers begin, and the numbers of what is refused
    "x86_64": (0xC000003E, 0x40000000, 0),
    "aarch64": (0xC00000B7, 0x80000000, 1),
}
REFUSED = {  # ways to more rights, to memory that no limit counts, to other processes; (x86_64, aarch64)
    **{"unshare": (272, 97), "setns": (308, 268), "ptrace": (101, 117), "pidfd_getfd": (438, 438)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "memfd_create": (319, 279)},
    **{"memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190)},
    **{"mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"io_uring_setup": (425, 425)},
}
SOCKET, CLONE, CLONE3 = (41, 198), (56, 220), (435, 435)
BY_FENCE = {  # what the program meets at the fence; a file outside is not there at all
    getattr(errno, name)
    for name in ("EPERM", "EACCES", "EROFS", "ENOSPC", "EFBIG", "EMFILE", "EAGAIN", "ENETUNREACH", "ENOSYS")
}
LONGEST = 500  # characters of an error's message

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *values):
    """A function of the C library; an OSError that names it where it fails."""
    values = [value.encode() if isinstance(value, str) else value for value in values]
    if getattr(libc, name)(*values) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source, target, kind, flags, data=None):
    call("mount", source, target, kind, ctypes.c_ulong(flags), data)


def own_namespaces(network):
    """Files, processes, network, IPC and host name of its own; root alone needs no namespace of users."""
    user, group = os.getuid(), os.getgid()
    flags = NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | (0 if network else NEW_NET)
    call("unshare", flags if user == 0 else flags | NEW_USER)
    if user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def own_root(disk, files):
    """Of all files only Python and the system's libraries, read-only, and an empty folder held in memory.

    Args:
        disk: bytes that the folder may hold.
        files: files that it may hold.
    """
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("fence", STAGE, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    prefix = os.path.realpath(sys.base_prefix)
    for path in (*SHOWN, *DEVICES, *([] if f"{prefix}/".startswith("/usr/") else [prefix])):
        show(path)
    os.mkdir(STAGE + HOME)
    mount("fence", STAGE + HOME, "tmpfs", NOSUID | NODEV, f"size={disk},nr_inodes={files},mode=1777")
    os.chdir(STAGE)
    attributes(".", READ_ONLY)
    call("pivot_root", ".", ".")
    call("umount2", ".", DETACH)
    os.chdir(HOME)


def show(path):
    """The same path below the new root, read-only."""
    if os.path.islink(path):
        os.symlink(os.readlink(path), STAGE + path)
    elif os.path.exists(path):
        os.makedirs(os.path.dirname(STAGE + path), exist_ok=True)
        if os.path.isdir(path):
            os.mkdir(STAGE + path)
        else:
            open(STAGE + path, "x").close()
        mount(path, STAGE + path, None, BIND | RECURSIVE)
        attributes(
            STAGE + path, READ_ONLY | NO_SETUID | (0 if path in DEVICES else NO_DEVICES), below=ALL_BELOW
        )


def attributes(path, wanted, below=0):
    """Set a mount's attributes."""
    wanted = ctypes.create_string_buffer(struct.pack("=QQQQ", wanted, 0, 0, 0), 32)
    call("syscall", ctypes.c_long(SET_ATTR), HERE, path, ctypes.c_uint(below), wanted, ctypes.c_size_t(32))


def without_rights(nobody):
    """Root becomes the user `nobody`; anyone else loses what the own namespace gave."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
    else:
        header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
        call("capset", ctypes.create_string_buffer(header, 8), ctypes.create_string_buffer(none, 24))
    call("prctl", NO_NEW_RIGHTS, 1, 0, 0, 0)


def filtered(network):
    """Refuse system calls, for good, and for all that the program starts."""
    if platform.machine() not in MACHINES:
        raise OSError(errno.ENOSYS, f"seccomp: no numbers of system calls are known for {platform.machine()}")
    machine, foreign, which = MACHINES[platform.machine()]
    load, equal, at_least, has, give = 0x20, 0x15, 0x35, 0x45, 0x06
    no, unknown, kill, yes = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000, 0x7FFF0000
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, kill)]
    steps += [(load, 0, 0, 0), (at_least, 0, 1, foreign), (give, 0, 0, kill)]
    for numbers in (*REFUSED.values(), *([] if network else [SOCKET])):
        steps += [(equal, 0, 1, numbers[which]), (give, 0, 0, no)]
    steps += [(equal, 0, 1, CLONE3[which]), (give, 0, 0, unknown)]  # the C library then takes clone
    steps += [(equal, 0, 3, CLONE[which]), (load, 0, 0, 16), (has, 0, 1, ANY_NEW), (give, 0, 0, no)]
    steps += [(give, 0, 0, yes)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    order = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    call("prctl", SECCOMP, FILTER, ctypes.create_string_buffer(order, len(order)), 0, 0)


def limited(limits):
    """The kernel's limits, none of which can be raised again."""
    for name, most in limits.items():
        beyond = most + (name == "CPU")  # a second to say so in, before it is killed
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, beyond))


def outcome(code):
    """Run a program to its end: (kind, message)."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        program = compile(code, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte, half a surrogate pair
        return "syntax error", said(error)
    except (RecursionError, MemoryError) as error:
        return "syntax error", said(error)
    try:
        exec(program, module.__dict__)
    except AssertionError as error:
        return "assertion", said(error)
    except MemoryError as error:
        return "memory", said(error)
    except BaseException as error:  # SystemExit too: a program that leaves has not come to its end
        is_refused = isinstance(error, OSError) and error.errno in BY_FENCE
        return "refused" if is_refused else "exception", said(error)
    return "passed", ""


def said(error):
    """An error's name and message; the message is made by the program, which may fail at that too."""
    try:
        return f"{type(error).__name__}: {error}"[:LONGEST]
    except BaseException:
        return type(error).__name__


def tell(report, **found):
    os.write(report, json.dumps(found).encode() + b"\n")


def program(order, report):
    """The grandchild: a session of its own, no input, no rights, then the program."""
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.environ.update(HOME=HOME, TMPDIR=HOME)
    try:
        filtered(order["network"])
        limited(order["limits"])
    except (OSError, ValueError) as error:
        tell(report, fence=str(error))
        os._exit(1)
    tell(report, started=True)  # what comes after it may be the program's own word
    kind, message = outcome(order["code"])
    try:
        sys.stdout.flush()
    finally:
        tell(report, kind=kind, message=message)
        os._exit(0)


def first(order, report, nobody):
    """The child, first of its namespace: start the program and wait for it; its end is everyone's."""
    try:
        without_rights(nobody)
        call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        child = os.fork()
    except OSError as error:
        tell(report, fence=str(error))
        os._exit(1)
    if child == 0:
        program(order, report)
    ended, status = 0, 0
    while ended != child:
        ended, status = os.wait()
    tell(report, status=os.waitstatus_to_exitcode(status))
    os._exit(0)


def main():
    report, order = int(sys.argv[1]), json.load(sys.stdin)
    sys.setrecursionlimit(1000)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory runs out, the kernel ends these first
        own_namespaces(order["network"])
        own_root(order["disk"], order["files"])
        call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        nobody = UNUSED + os.getpid()  # one for each fence, as a user's processes are counted together
        child = os.fork()
    except OSError as error:
        tell(report, fence=str(error))
        os._exit(1)
    if child == 0:
        first(order, report, nobody)
    os.waitpid(child, 0)
    os._exit(0)


if __name__ == "__main__":
    main()
