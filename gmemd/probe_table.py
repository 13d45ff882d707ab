"""The table of everything that can be asked of a host: what is tried, what a "no" means, and how to mend it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from gmemd import probe_host as host
from gmemd import probe_kernel as kernel
from gmemd.probe_kernel import Finding, Memory

HUGE_2M, HUGE_1G = 2 << 20, 1 << 30

ACCESS = (
    'a udev rule KERNEL=="userfaultfd", GROUP="kvm", MODE="0660" with the VMM\'s user in that group; '
    "or CAP_SYS_PTRACE for the VMM; or sysctl vm.unprivileged_userfaultfd=1"
)
KVM_ACCESS = "the VMM's user in the group of /dev/kvm; kvm_intel or kvm_amd loaded; nested virtualisation on"
UFFD_KERNEL = "Linux 5.14 or later with CONFIG_USERFAULTFD, and access to it (userfaultfd.access)"
PROPOSED = "no released kernel has it: use memfd, or a kernel with the proposed patches (make lab-kernel)"
GUEST_MEMFD_KERNEL = "a kernel with CONFIG_KVM_GUEST_MEMFD; Linux 6.18 has this"
HUGE_POOL = "sysctl vm.nr_hugepages=N, for a guest of N times 2 MiB"
TCP_BUFFER = "sysctl net.ipv4.tcp_{}='4096 131072 {}' or more"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to ask. `means`: what a "no" means for the user. `mend`: what to do, "" where nothing is to do."""

    name: str
    try_it: Callable[[], Finding]
    means: str
    mend: str = ""

    @property
    def topic(self) -> str:
        """What stands before the first dot of the name."""
        return self.name.split(".")[0]


def _access() -> Finding:
    """`value`: the first way that traps the kernel's faults, or "user-mode only"."""
    seen = []
    for way in (kernel.uffd_device, kernel.uffd_syscall):
        found = way()
        if found.ok:
            return found
        seen.append(found.why)
    user_mode = kernel.uffd_user_mode()
    return Finding(False, "user-mode only" if user_mode.ok else None, "; ".join(seen))


def _device(try_it: Callable[[], Finding], path: str) -> Finding:
    found = try_it()
    return found if found.ok else replace(found, why=f"{found.why}; {host.owner_and_mode(path)}")


def _syscall() -> Finding:
    found = kernel.uffd_syscall()
    return found if found.ok else replace(found, why=f"{found.why}; {host.syscall_rights()}")


def _of_memory(memory: Memory) -> list[Check]:
    """What is asked of each kind of memory."""

    def check(what: str, call: Callable[[Memory], Finding], means: str, mend: str = "") -> Check:
        return Check(f"{memory}.{what}", partial(call, memory), means, mend)

    proposed = memory in (Memory.GUEST_MEMFD, Memory.NO_DIRECT_MAP)
    uffd = PROPOSED if proposed else UFFD_KERNEL
    return [
        check("missing", kernel.missing, "a vCPU reads zeros where a page has not arrived", uffd),
        check("minor", kernel.minor, "a vCPU reads a page that is still being filled", uffd),
        check(
            "missing_minor",
            kernel.missing_minor,
            "absent and half-filled pages are not both trapped; MINOR alone does if it stops at absent pages",
        ),
        check("absent_in_minor", kernel.absent_in_minor, "gmemd has to register MISSING as well"),
        check("continue", kernel.uffd_continue, "populated pages cannot be given to the guest", uffd),
        check("copy", kernel.uffd_copy, "nothing: gmemd populates the file and continues"),
        check("zeropage", kernel.uffd_zeropage, "nothing: gmemd makes zero pages in the file"),
        check("poison", kernel.uffd_poison, "nothing: a guest waits for a page that is lost"),
        check("wake", kernel.uffd_wake, "a restarted daemon does not get the open faults back", uffd),
        check("thread_id", kernel.uffd_thread_id, "traces cannot say which thread waits"),
        check("event_remove", kernel.uffd_event_remove, "no balloon during a migration: gmemd is not told", uffd),
        check(
            "populate_write",
            kernel.by_write,
            "pages are filled through a mapping, which costs page faults and about twice the time",
            PROPOSED if proposed else "",
        ),
        check("populate_recv", kernel.by_recv, "pages are copied once more on their way from the socket"),
        check("populate_copy", kernel.by_copy, "the file cannot be mapped and filled"),
        check("madv_populate_write", kernel.by_madvise, "the alias is mapped a fault at a time"),
        check("pin", kernel.pin, "the mapping is no plain slot for KVM: give it the guest_memfd itself"),
    ]


USERFAULTFD = [
    Check(
        "userfaultfd.access",
        _access,
        "a VMM of this user cannot trap KVM's faults, which are the kernel's: it can receive no guest",
        ACCESS,
    ),
    Check(
        "userfaultfd.device",
        partial(_device, kernel.uffd_device, "/dev/userfaultfd"),
        "the way that needs file permission alone is closed",
    ),
    Check("userfaultfd.syscall", _syscall, "the VMM has to come in through /dev/userfaultfd"),
    Check("userfaultfd.user_mode", kernel.uffd_user_mode, "the kernel has no userfaultfd, or a filter hides it"),
    Check("userfaultfd.features", kernel.uffd_features, "it cannot be told what userfaultfd offers"),
    Check("userfaultfd.move", kernel.uffd_move, "nothing: gmemd does not use it"),
]

KVM = [
    Check(
        "kvm.device",
        partial(_device, kernel.kvm, "/dev/kvm"),
        "no VM runs here; `gmemd demo` puts threads in the place of vCPUs",
        KVM_ACCESS,
    ),
    Check("kvm.vm", kernel.kvm_vm, "no VM runs here", KVM_ACCESS),
    Check("kvm.slot", partial(kernel.slot, Memory.MEMFD), "KVM takes no mapping as memory", KVM_ACCESS),
    Check("kvm.guest_memfd", kernel.guest_memfd, "guests live in memfd or hugetlb memory", GUEST_MEMFD_KERNEL),
    Check(
        "kvm.guest_memfd_flags",
        kernel.guest_memfd_flags,
        "guest_memfd cannot be mapped, so that it can be neither filled nor watched",
        GUEST_MEMFD_KERNEL,
    ),
    Check("kvm.guest_memfd_slot", kernel.guest_memfd_slot, "give KVM the mapping instead", GUEST_MEMFD_KERNEL),
    Check("kvm.no_direct_map", kernel.no_direct_map, "guest memory stays in the kernel's direct map", PROPOSED),
    Check(
        "kvm.userfault",
        kernel.kvm_userfault,
        "in a guest_memfd slot nothing stops a vCPU at a page that has not arrived: give KVM the mapping",
        PROPOSED,
    ),
    Check("kvm.pre_fault", kernel.pre_fault, "a page costs the guest one more exit at its first touch"),
]

HOST = [
    Check(
        "network.ktls",
        host.ktls,
        "with TLS on, pages are encrypted in user space, which costs copies",
        "modprobe tls, or a kernel with CONFIG_TLS",
    ),
    Check(
        "network.tcp_rmem",
        host.tcp_receive,
        "one connection does not fill a fast link with some latency, as the destination",
        TCP_BUFFER.format("rmem", host.SOCKET_BUFFER),
    ),
    Check(
        "network.tcp_wmem",
        host.tcp_send,
        "one connection does not fill a fast link with some latency, as the source",
        TCP_BUFFER.format("wmem", host.SOCKET_BUFFER),
    ),
    Check("process.pidfd", host.pidfd, "the death of a VMM shows by its socket only", "no filter on pidfd_open"),
    Check("process.peer_pidfd", host.peer_pidfd, "the VMM is found by its process id, which might be reused"),
    Check(
        "limits.open_files",
        host.open_files,
        "many migrations at once run out of descriptors",
        f"LimitNOFILE={host.OPEN_FILES} or more in gmemd.service; ulimit -n",
    ),
    Check(
        "limits.priority",
        host.priority,
        "on a busy host, answers to faults wait for a CPU as long as everything else",
        f"LimitNICE={host.FIRST_NICE} in gmemd.service; ulimit -e {20 - host.FIRST_NICE}",
    ),
    Check("limits.file_size", host.file_size, "the memory of a large guest cannot be written", "ulimit -f unlimited"),
    Check(
        "limits.sparse_memory",
        host.sparse_memory,
        "the memory of a guest of 1 TiB cannot be mapped",
        "ulimit -v unlimited, ulimit -f unlimited",
    ),
    Check(
        "limits.memory_cgroup",
        host.memory_cgroup,
        "what gmemd writes counts as its own memory: a guest beyond the limit gets it killed",
        "no MemoryMax= for gmemd.service and the slices above it",
    ),
    Check(
        "limits.large_folios",
        host.large_folios,
        "filling memory takes the destination's CPUs about twice as long; a file on a tmpfs has a setting of its own",
        "a tmpfs mounted with huge=within_size for guest memory; or, for memfds, "
        "echo within_size >/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    ),
    Check("limits.available_memory", host.available_memory, "it cannot be told what fits"),
    Check("limits.shared_memory", host.shared_memory, "no guest memory in /dev/shm; memfd does not depend on it"),
    Check("limits.huge_pages_2m", partial(host.huge_pages, HUGE_2M), "no guest on 2 MiB pages arrives", HUGE_POOL),
    Check("limits.huge_pages_1g", partial(host.huge_pages, HUGE_1G), "nothing: gmemd takes huge pages of 2 MiB"),
    Check(
        "systemd.fd_store",
        host.fd_store,
        "a daemon that crashes forgets its migrations: their guests wait for ever",
        "FileDescriptorStoreMax= in gmemd.service",
    ),
    Check("sandbox.seccomp", host.seccomp, "a filter may be what refuses a call above"),
    Check("sandbox.security_module", host.security_module, "its profile may be what refuses a call above"),
    Check(
        "sandbox.user_namespace",
        host.user_namespace,
        "root here is not the host's: only /dev/userfaultfd, by its permissions, traps the kernel's faults",
    ),
    Check("sandbox.container", host.container, "/dev/userfaultfd and /dev/kvm have to be passed in"),
    Check("cpu.crc32c", kernel.crc32c, "checksums take many times as long", "checksum = false, on a safe link"),
    Check(
        "cpu.clock",
        kernel.clock,
        "time stamps cost system calls, and make latencies larger",
        "a clock source for user space: clocksource=tsc, or kvm-clock in a VM",
    ),
]

CHECKS = {
    check.name: check
    for check in (*USERFAULTFD, *KVM, *(row for memory in Memory for row in _of_memory(memory)), *HOST)
}
