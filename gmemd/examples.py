"""What `--help` and the man pages show of each command: a line to type, and what it does."""

EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "gmemd": [
        ("gmemd doctor", "can this host receive guests, and if not, what is missing"),
        ("gmemd demo --memory 256M", "the whole thing once, on this host alone"),
    ],
    "gmemd serve": [
        ("gmemd serve --config /etc/gmemd/gmemd.toml", "receive guests; systemd does the same by gmemd.service"),
        ("gmemd serve --dump-config", "every key of the configuration with the value that it has"),
    ],
    "gmemd status": [
        ("gmemd status --watch", "how far each guest is, who waits for what, and for how long; until Ctrl-C"),
        ("gmemd status --json", "the same for programs"),
    ],
    "gmemd abandon": [("gmemd abandon first", "the source of migration `first` is lost with its memory: let go of it")],
    "gmemd doctor": [("gmemd doctor --json", "what this host can do, for programs")],
    "gmemd demo": [
        ("gmemd demo --memory 256M --vcpus 4", "a guest of 256 MiB with 4 vCPUs moves and is checked, page by page"),
        ("gmemd demo --memory 256M --inject daemon-kill@50", "the daemon is killed half-way"),
    ],
    "gmemd-source": [
        ("gmemd-source host-b --migration first --vmm /run/vm/first.sock", "the guest of a VMM goes to host-b"),
        ("gmemd-source host-b:7575 --migration first --file /dev/shm/memory", "a memory file goes, as one region"),
        (
            "gmemd-source host-b --migration first --vmm /run/vm/first.sock --rate 100M",
            "at most 100 MiB/s in the background; pages that the guest waits for are never held back",
        ),
    ],
    "gmemd-replay": [
        ("gmemd-replay synth zipf -o zipf.gmtrace --pages 16384", "a trace of a well-known pattern"),
        ("gmemd-replay show zipf.gmtrace", "what is in it"),
        ("gmemd-replay run zipf.gmtrace", "play it against a daemon and a source, and check every page"),
    ],
}
EXIT_CODES = (
    "exit codes: 0 success, 64 usage, 65 data, 69 unavailable, 71 kernel, 75 link (try again), 76 protocol,\n"
    "  77 permission, 78 configuration; 1 with a traceback is a mistake of gmemd"
)


def epilog(prog: str) -> str | None:
    """What comes at the end of a command's help."""
    lines = [f"  {line}\n      {what}" for line, what in EXAMPLES.get(prog, [])]
    if lines:
        lines.insert(0, "examples:")
    if " " not in prog:
        lines.append(("\n" if lines else "") + EXIT_CODES)
    return "\n".join(lines) or None
