"""Who plays in a demo: a daemon, a VMM on each side, a sender between them; and what can be done to them."""

import os
from dataclasses import dataclass, field

import trio

from gmemd.errors import UnavailableError
from gmemd_tools.demo.plan import Plan
from gmemd_tools.demo.processes import LATE, Process, Stage
from gmemd_tools.network.link import Link

READY_SECONDS = 60.0  # Python starts in 5 s in an emulated machine, on a host that does nothing else
# Longer than it takes both ends to find a stalled link dead.
STALL_SECONDS = 2.0
LOOK_SECONDS = 0.01


@dataclass
class Cast:
    """The processes of one migration. With a `link`, the sender goes through it. `environ` is for the daemon."""

    plan: Plan
    stage: Stage
    link: Link | None = None
    environ: dict[str, str] = field(default_factory=dict)
    daemon: Process = field(init=False)
    source: Process = field(init=False)
    destination: Process = field(init=False)
    sender: Process = field(init=False)

    async def start_daemon(self) -> None:
        """Starts the daemon and waits until it is ready, as a service manager would."""
        path = self.plan.directory / "notify.sock"
        path.unlink(missing_ok=True)
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as notify:
            await notify.bind(str(path))
            self.daemon = await self.stage.python(
                "daemon", "gmemd.cli", *self.plan.daemon(), environ=self.environ | {"NOTIFY_SOCKET": str(path)}
            )
            with trio.move_on_after(READY_SECONDS):
                while self.daemon.process.poll() is None:
                    with trio.move_on_after(LOOK_SECONDS):
                        if b"READY=1" in await notify.recv(4096):
                            return
        if self.daemon.process.returncode is not None:
            raise await self.daemon.why_ended()
        raise UnavailableError(f"the daemon does not become ready: {self.daemon.last_words()}")

    async def start_source(self) -> None:
        """Starts the VMM that has the guest, and waits until the guest runs."""
        self.source = await self.stage.vmm("source", *self.plan.source())
        await self.source.event("running")

    async def start_destination(self) -> None:
        """Starts the VMM that is to have it."""
        self.destination = await self.stage.vmm("destination", *self.plan.destination())

    async def start_sender(self) -> None:
        port = self.link.port if self.link else self.plan.port
        self.sender = await self.stage.python("sender", "gmemd.source_cli", *self.plan.sender(port))

    async def attend_daemon(self) -> None:
        """Raises why it ended, when nobody told it to."""
        while True:
            daemon = self.daemon
            await daemon.process.wait()
            if not daemon.told_to_end:
                raise await daemon.why_ended()
            while self.daemon is daemon:  # noqa: ASYNC110 (somebody else is at it)
                await trio.sleep(LOOK_SECONDS)

    async def attend_sender(self, spoilt: bool) -> None:
        """The same, until it has sent everything. One that heard what it refused on a line that spoils bytes is started
        again, as a service manager would."""
        while True:
            sender = self.sender
            code = await sender.process.wait()
            if code == os.EX_OK or LATE.search(sender.last_words()):
                return
            if spoilt and code == os.EX_PROTOCOL:
                await self.start_sender()
            elif not sender.told_to_end:
                raise await sender.why_ended()
            while self.sender is sender:  # noqa: ASYNC110 (somebody else is at it)
                await trio.sleep(LOOK_SECONDS)

    async def cut(self) -> None:
        assert self.link
        self.link.cut()

    async def stall(self, seconds: float = STALL_SECONDS) -> None:
        assert self.link
        self.link.stall()
        await trio.sleep(seconds)
        self.link.heal()

    async def kill_daemon(self) -> None:
        await self.daemon.kill()
        await self.start_daemon()

    async def restart_daemon(self) -> None:
        await self.stage.end(self.daemon)
        await self.start_daemon()

    async def kill_sender(self) -> None:
        await self.sender.kill()
        await self.start_sender()
