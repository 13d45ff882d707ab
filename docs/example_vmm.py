"""example_vmm.py SOCKET MIGRATION BYTES: a VMM without a guest. Receives memory through gmemd, and prints its hash."""

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import socket
import struct
import sys

PAGE = 4096
UFFD = 0xAA  # the kernel's UFFD_API, and the letter of its ioctls
NEW, API = 0xAA00, 0xC018AA3F  # USERFAULTFD_IOC_NEW, UFFDIO_API
THREAD_ID = 1 << 8  # UFFD_FEATURE_THREAD_ID: `gmemd status` can tell who waits


def make_userfaultfd() -> int:
    """Non-blocking, with UFFDIO_API done: otherwise nobody can wait for its messages."""
    with open("/dev/userfaultfd", "rb") as device:
        uffd = fcntl.ioctl(device, NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(uffd, API, struct.pack("QQQ", UFFD, THREAD_ID, 0))
    return uffd


def main() -> None:
    path, migration, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    file = os.memfd_create("guest-memory")
    os.ftruncate(file, size)
    memory = mmap.mmap(file, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    uffd = make_userfaultfd()  # stays open until all is done: it is what keeps those waiting who touch missing pages

    region = {"file": 0, "offset": 0, "size": size, "page_size": PAGE, "gpa": 0, "hva": address, "uffd": 1}
    daemon = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon.connect(path)
    hand_off = json.dumps({"gmemd": 1, "receive": migration, "regions": [region]})
    socket.send_fds(daemon, [hand_off.encode()], [file, uffd])

    data, descriptors, _, _ = socket.recv_fds(daemon, 128 << 10, 64)
    answer = json.loads(data)
    if "ready" not in answer:
        sys.exit(f"the guest must not run here: {answer}")
    state = os.pread(descriptors[answer["state"]], 1 << 20, 0)
    print(f"{len(state)} bytes of device state; the guest would run from here on")

    print(hashlib.sha256(memory).hexdigest())  # touches every page, and waits for those that are not here yet
    print(daemon.recv(128 << 10).decode())  # {"done": true, …}


if __name__ == "__main__":
    main()
