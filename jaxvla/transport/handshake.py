"""How two processes convince each other that they hold the same token. No jax.

Both sides send a greeting at once; then the client makes its claim, and the listener answers.
Every message has a fixed size, so that nothing is parsed before it has been verified:

    greeting  16 preamble, 32 nonce                                        each side
    claim     64 name, 4 milliseconds between pings, 32 proof              client
    answer    1 status, 64 name, 4 milliseconds between pings, 32 proof    listener

A proof is the HMAC-SHA256, with the token as its key, of: who makes it, the preamble, both
nonces, the digest of the listener's certificate (zeros without TLS), and the message before it.
A recorded handshake fails because the nonces differ, a reflected one because the roles do, and
one that is passed on through another TLS server because the certificates do.

Without TLS the frames that follow are neither encrypted nor protected: who can change packets on
the way can take the connection over after the handshake.
"""

import hashlib
import hmac
import re
import secrets
import struct
from dataclasses import dataclass

from jaxvla.transport.streams import Stream

MIN_TOKEN_BYTES = 16
"""128 bits, if they are random."""

ACCEPTED, FULL, MISMATCH = 0, 1, 2
"""Status of an answer: welcome; the listener has its most connections; the two sides' settings
of pings and silence do not fit."""

_PREAMBLE = b"jaxvla channel 1"
_GREETING = struct.Struct("<16s32s")
_CLAIM, _ANSWER = struct.Struct("<64sI"), struct.Struct("<B64sI")
_PROOF_BYTES = 32
_NAME = re.compile(rb"[A-Za-z0-9_.-]{1,64}")


class HandshakeError(ConnectionError):
    """The other side does not hold the token, or does not speak this protocol."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Party:
    """What one side says of itself."""

    name: str
    """1 to 64 of A-Z a-z 0-9 _ . -"""
    ping_ms: int
    """Longest time without bytes from it."""

    def __post_init__(self):
        if not _NAME.fullmatch(self.name.encode(errors="replace")):
            raise ValueError(f"name {self.name[:80]!r} is not 1 to 64 of A-Z a-z 0-9 _ . -")
        if not 0 < self.ping_ms < 2**32:
            raise ValueError(f"pings every {self.ping_ms} ms: must be in (0, 2**32)")


class ClientHandshake:
    """The side that has connected."""

    def __init__(self, stream: Stream, token: bytes, certificate: bytes | None):
        """certificate: of the listener, DER; None without TLS."""
        self._stream = stream
        self._proofs = _greet(stream, token, certificate, is_client=True)

    def run(self, own: Party) -> tuple[int, Party]:
        """Proves who we are and asks for the same.

        Returns:
          The listener's status and what it says of itself.

        Raises:
          HandshakeError: its proof is wrong.
          OSError, EOFError: the connection ended, as it does when our proof was wrong.
        """
        claim = _CLAIM.pack(own.name.encode(), own.ping_ms)
        self._stream.write([claim + self._proofs.of(b"client", claim)])
        answer = _read(self._stream, _ANSWER.size)
        self._proofs.require(b"listener", claim + answer, _read(self._stream, _PROOF_BYTES))
        status, name, ping_ms = _ANSWER.unpack(answer)
        return status, _party(name, ping_ms)


class ListenerHandshake:
    """The side that was connected to."""

    def __init__(self, stream: Stream, token: bytes, certificate: bytes | None):
        """certificate: our own, DER; None without TLS."""
        self._stream = stream
        self._proofs = _greet(stream, token, certificate, is_client=False)
        self._claim = b""

    def read_claim(self) -> Party:
        """What the client says of itself, proven.

        Raises:
          HandshakeError: its proof is wrong.
          OSError, EOFError: the connection ended.
        """
        claim = _read(self._stream, _CLAIM.size)
        self._proofs.require(b"client", claim, _read(self._stream, _PROOF_BYTES))
        self._claim = claim
        return _party(*_CLAIM.unpack(claim))

    def answer(self, status: int, own: Party) -> None:
        """Proves who we are. Only after `read_claim`."""
        answer = _ANSWER.pack(status, own.name.encode(), own.ping_ms)
        self._stream.write([answer + self._proofs.of(b"listener", self._claim + answer)])


class _Proofs:
    def __init__(self, token: bytes, context: bytes):
        self._token = token
        self._context = context

    def of(self, role: bytes, message: bytes) -> bytes:
        text = role.ljust(16, b"\0") + self._context + message
        return hmac.digest(self._token, text, "sha256")

    def require(self, role: bytes, message: bytes, proof: bytes) -> None:
        if not hmac.compare_digest(self.of(role, message), proof):  # in constant time
            raise HandshakeError("the other side does not hold the same token")


def _greet(stream: Stream, token: bytes, certificate: bytes | None, is_client: bool) -> _Proofs:
    own = secrets.token_bytes(32)
    stream.write([_GREETING.pack(_PREAMBLE, own)])
    preamble, other = _GREETING.unpack(_read(stream, _GREETING.size))
    if preamble != _PREAMBLE:
        raise HandshakeError("the other side does not speak jaxvla's protocol, or another version")
    nonces = own + other if is_client else other + own
    binding = hashlib.sha256(certificate).digest() if certificate is not None else bytes(32)
    return _Proofs(token, _PREAMBLE + nonces + binding)


def _read(stream: Stream, size: int) -> bytes:
    data = bytearray(size)
    stream.read(memoryview(data))
    return bytes(data)


def _party(name: bytes, ping_ms: int) -> Party:
    """Raises HandshakeError where one with the token says what no Party says."""
    try:
        return Party(name=name.rstrip(b"\0").decode("ascii"), ping_ms=ping_ms)
    except ValueError as error:
        raise HandshakeError(f"the other side's claim is wrong: {error}") from error
