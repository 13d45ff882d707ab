"""`make syscalls`: the calls that daemons make while the tests do what they can to them; the unit allows no other."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TREE = Path(__file__).parents[1]
UNIT = TREE / "systemd/gmemd.service"
TESTS = ("test_daemon*.py", "test_handoff*.py", "test_fuzz_daemon.py", "test_metrics.py", "test_guest_memfd.py")
PREFIX = "sh -c 'exec strace -D -f -qq --seccomp-bpf -c -U name -S name -o {folder}/$$ \"$@\"' strace"
HEADINGS = {"syscall", "total"}
# These do not return to be counted, or are the kernel's own doing.
UNCOUNTED = {"exit", "exit_group", "restart_syscall", "rt_sigreturn", "execve"}
# What libraries may use in place of one of them, by their version or the architecture; on abort; when memory is short.
ALIKE = [
    {"accept", "accept4"},
    {"access", "faccessat", "faccessat2"},
    {"brk", "madvise", "mmap", "mremap", "munmap"},
    {"chmod", "fchmod", "fchmodat"},
    {"chown", "fchown", "fchownat"},
    {"clock_gettime", "clock_nanosleep", "gettimeofday", "nanosleep"},
    {"clone", "clone3"},
    {"dup", "dup2", "dup3"},
    {"epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait"},
    {"fcntl", "fstat", "fstatfs", "lstat", "newfstatat", "stat", "statx"},
    {"futex", "futex_waitv", "membarrier", "rseq", "sched_yield"},
    {"getegid", "geteuid", "getgid", "getgroups", "getuid"},
    {"getpid", "gettid", "tgkill"},
    {"mkdir", "mkdirat"},
    {"open", "openat"},
    {"pipe", "pipe2"},
    {"poll", "ppoll", "pselect6", "select"},
    {"pread64", "preadv", "read", "readv"},
    {"pwrite64", "pwritev", "write", "writev"},
    {"process_vm_readv", "process_vm_writev"},
    {"readlink", "readlinkat"},
    {"recvfrom", "recvmmsg", "recvmsg"},
    {"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack"},
    {"sendmmsg", "sendmsg", "sendto"},
    {"sysinfo", "uname"},
    {"unlink", "unlinkat"},
    {"getcwd", "getrandom", "prlimit64", "sched_getaffinity"},
]
WIDTH = 110
COMMENT = (
    "# Found by `make syscalls`: what daemons call in the tests, and what libraries may use in place of that. vfork\n"
    "# and wait4 are for ldconfig, which trio runs once, to find how threads are named.\n"
)


def found() -> set[str]:
    """In all daemons of the tests. That these are slow under it, and some fail, does no harm."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        environ = os.environ | {"GMEMD_TEST_DAEMON_PREFIX": PREFIX.format(folder=folder)}
        tests = [str(path) for pattern in TESTS for path in sorted((TREE / "tests").glob(pattern))]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=TREE, env=environ, check=False)
        words = {word for path in Path(folder).iterdir() for word in path.read_text().split()}
        return {word for word in words if re.fullmatch("[a-z][a-z0-9_]+", word)} - HEADINGS


def widened(names: set[str]) -> set[str]:
    return names | UNCOUNTED | {name for alike in ALIKE if alike & names for name in alike}


def lines(names: set[str]) -> str:
    out = [""]
    for name in sorted(names):
        if len(out[-1]) + len(name) > WIDTH:
            out.append("")
        out[-1] += f" {name}"
    return "".join(f"SystemCallFilter={line.strip()}\n" for line in out)


def main() -> int:
    names = found()
    if not names:
        print("no daemon was seen: is there strace?", file=sys.stderr)
        return 1
    old = r"(#[^\n]*\n)*(SystemCallFilter=[^\n]*\n)+"
    UNIT.write_text(re.sub(old, COMMENT + lines(widened(names)), UNIT.read_text()))
    print(f"{len(names)} calls found, {len(widened(names))} allowed, written to {UNIT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
