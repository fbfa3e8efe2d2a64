"""Checks of secrets: the cluster token, Ray's token file, and the certificates of expert and trunk ports."""

from __future__ import annotations

import os
import ssl
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_ray.config import TlsSection
from moe_ray.deploy.ray_internals import AUTH_TOKEN_PATH, DEFAULT_TOKEN_FILE
from moe_ray.doctor.finding import Finding, Subject, error, ok, warning

LEAST_TOKEN: Final = 16
SOON_S: Final = 14 * 24 * 3600


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """The cluster token and Ray's, without their values."""

    cluster_token_length: int | None
    """None: derived from Ray's token, or none."""
    file: Path | None
    """Ray's token file; None: this user has no home, and none is named."""
    named: bool
    """RAY_AUTH_TOKEN_PATH names it."""
    exists: bool
    readable: bool
    open_to_others: bool


def token_facts(subject: Subject) -> TokenFacts:
    """Look at lengths and modes."""
    token, named = subject.config.cluster_token, subject.environ.get(AUTH_TOKEN_PATH)
    try:
        file: Path | None = Path(named or DEFAULT_TOKEN_FILE).expanduser()
    except RuntimeError:
        file = None
    exists = file is not None and file.is_file()
    return TokenFacts(
        cluster_token_length=None if token is None else len(token),
        file=file,
        named=bool(named),
        exists=exists,
        readable=exists and file is not None and os.access(file, os.R_OK),
        open_to_others=exists and file is not None and open_to_others(file),
    )


def open_to_others(file: Path) -> bool:
    """Whether other users may read or write a file: by its mode, and those of the directories on the way to it."""
    if not stat.S_IMODE(file.stat().st_mode) & 0o066:
        return False
    return all(stat.S_IMODE(parent.stat().st_mode) & 0o011 for parent in file.absolute().parents)


def check_tokens(facts: TokenFacts) -> list[Finding]:
    """Tokens are secret, and where they are looked for."""
    found = []
    if facts.cluster_token_length is not None and facts.cluster_token_length < LEAST_TOKEN:
        says = f"cluster_token has {facts.cluster_token_length} characters, which can be guessed"
        found.append(warning("tokens", says, "openssl rand -hex 32"))
    if facts.named and not facts.exists:
        mend = f"unset {AUTH_TOKEN_PATH}, or put the cluster's token there"
        found.append(error("tokens", f"{AUTH_TOKEN_PATH} names {facts.file}, which is no file", mend))
    elif facts.exists and not facts.readable:
        found.append(
            error("tokens", f"{facts.file} cannot be read", f"chown it to this user, or set {AUTH_TOKEN_PATH}")
        )
    elif facts.open_to_others:
        says = f"{facts.file} can be read by others: who has it commands Ray"
        found.append(warning("tokens", says, f"chmod 600 {facts.file}"))
    said = f"Ray's in {facts.file}" if facts.exists else "Ray's is made when a server starts"
    own = "" if facts.cluster_token_length is None else ", cluster_token is set"
    return found or [ok("tokens", said + own)]


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """What a connection between two peers with these certificates comes to."""

    missing: tuple[str, ...] = ()
    """Files that cannot be read: `tls.key (/etc/key.pem)`."""
    fault: str | None = None
    """Why the two would not talk."""
    key: Path | None = None
    key_open_to_others: bool = False
    expires_at: float | None = None
    """Seconds since 1970."""


def tls_facts(tls: TlsSection) -> TlsFacts:
    """Connect two peers in this process, each of which shows the certificate and demands the other's."""
    files = {"tls.certificate": tls.certificate, "tls.key": tls.key, "tls.ca": tls.ca}
    missing = tuple(f"{key} ({file})" for key, file in files.items() if not os.access(file, os.R_OK))
    if missing:
        return TlsFacts(missing)
    key = Path(tls.key)
    opened = open_to_others(key)
    try:
        return TlsFacts((), None, key, opened, _expiry(tls))
    except (ssl.SSLError, OSError, ValueError) as failure:
        said = getattr(failure, "verify_message", None) or getattr(failure, "reason", None) or str(failure)
        return TlsFacts((), str(said), key, opened)


def check_tls(facts: TlsFacts, now: float) -> list[Finding]:
    """Peers with these files would talk, today and in two weeks."""
    if facts.missing:
        return [error("tls", f"cannot be read: {', '.join(facts.missing)}", "correct the paths, or their modes")]
    if facts.fault is not None:
        says = f"certificate, key and ca do not make a connection: {facts.fault}"
        return [error("tls", says, "issue a certificate of that authority for this key: docs/security.md")]
    found = []
    if facts.key_open_to_others:
        found.append(warning("tls", f"{facts.key} can be read by others", f"chmod 600 {facts.key}"))
    days = None if facts.expires_at is None else (facts.expires_at - now) / 86400
    if days is not None and days * 86400 < SOON_S:
        found.append(warning("tls", f"the certificate is valid for {days:.1f} days more", "issue a new one"))
    return found or [
        ok("tls", "two peers with these files trust each other" + (f", for {days:.0f} days" if days else ""))
    ]


def examine_credentials(subject: Subject) -> Sequence[Finding]:
    """Tokens and certificates."""
    tls = subject.config.tls
    certificates = [ok("tls", "off")] if tls is None else check_tls(tls_facts(tls), time.time())
    return [*check_tokens(token_facts(subject)), *certificates]


def _expiry(tls: TlsSection) -> float | None:
    """When the certificate ends, in seconds since 1970. Raises what the handshake raises."""
    server, client = (_context(purpose, tls) for purpose in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (server.wrap_bio(to_server, to_client, server_side=True), client.wrap_bio(to_client, to_server))
    done = 0
    for _ in range(8):  # each takes turns; two rounds are enough for a handshake
        for end in ends:
            try:
                end.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                done = 0
        if done >= len(ends):
            break
    ends[0].version()
    shown = ends[1].getpeercert()
    after = shown.get("notAfter") if shown else None
    return float(ssl.cert_time_to_seconds(after)) if isinstance(after, str) else None


def _context(purpose: int, tls: TlsSection) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(tls.certificate, tls.key)
    context.load_verify_locations(tls.ca)
    return context
