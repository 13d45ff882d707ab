"""Which hosts may come in as sources, and which of them may feed which migration."""

import logging
from fnmatch import fnmatchcase

import trio

from gmemd.address import is_loopback
from gmemd.config import Config
from gmemd.credentials import Credentials, Files
from gmemd.errors import LinkError, RefusedError
from gmemd.migrate.tls import TlsStream, check_name, shake_hands
from gmemd.migrate.wire import MAGIC
from gmemd.native.tls import Tls

log = logging.getLogger(__name__)


class Admission:
    """Lets sources in that can prove a name which the configuration has."""

    def __init__(self, config: Config) -> None:
        tls = config.tls
        files = Files(
            certificate=tls.certificate,
            key=tls.key,
            ca=tls.ca,
            crl=tls.crl,
            psk=tls.psk,
            ktls=tls.ktls,
            place=lambda key, _: config.place("tls", key),
        )
        self._credentials = Credentials(files, server=True)
        self._timeout = config.network.handshake_timeout
        self._peers = tls.peers
        self._rules = config.sources

    async def admit(self, transport: trio.SocketStream) -> TlsStream:
        """The connection, once it is known whose it is. RefusedError for a source that talks in plain text, and so can
        be told."""
        with trio.move_on_after(self._timeout):
            try:
                first = await transport.socket.recv(1, trio.socket.MSG_PEEK)
            except OSError as error:
                raise LinkError(f"TLS: {error.strerror}") from None
            if first == MAGIC[:1]:
                raise RefusedError("it does not speak TLS, which has to be spoken here: sent by the source")
        return await shake_hands(transport, self._credentials.context(), self._timeout)

    def check(self, session: Tls, migration: str | None) -> None:
        """Whether the peer may be a source here, or of this migration: UntrustedError if not. Without any rule, every
        one may be of every migration."""
        if migration is None:
            check_name(session, self._peers, "the peers that may come here")
        elif self._rules:
            lists = [names for pattern, names in self._rules.items() if fnmatchcase(migration, pattern)]
            allowed = {name for names in lists for name in names}
            check_name(session, allowed, f"the peers that may feed migration {migration}")


def for_listener(config: Config, host: str) -> Admission | None:
    """What sources have to show that come to this address; None for nothing. ConfigError if that is not safe."""
    mode, tls = config.network.tls, config.tls
    files = tls.certificate or tls.psk
    if mode == "auto":
        mode = "off" if is_loopback(host) and not files else "require"
    elif mode == "off" and not is_loopback(host):
        if not config.network.plain_text_on_network:
            why = (
                f"sources come over the network to {host}, so guests' memory would travel as plain text, from whoever"
                " connects; if that is meant, say plain_text_on_network = true, too"
            )
            raise config.wrong("network", "tls", why)
        log.warning('tls = "off": guests\' memory comes to %s as plain text, from whoever connects', host)
    if mode == "off":
        return None
    if not files:
        why = f"sources that come to {host} need TLS, and [tls] has neither a certificate nor a psk: give one of them"
        raise config.wrong("network", "tls", why)
    if not tls.peers:
        raise config.wrong("tls", "peers", 'nobody could come; name who may: ["*"] lets in whoever ca vouches for')
    return Admission(config)
