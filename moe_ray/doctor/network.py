"""Checks of what lies outside: proxies of the environment, the Hugging Face Hub, and this machine's clock."""

from __future__ import annotations

import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

import httpx

from moe_ray.deploy.urls import open_directly, taken_by_proxy, url_of
from moe_ray.doctor.finding import Finding, Subject, error, ok, warning

TIMEOUT_S: Final = 4.0
LOOPBACK: Final = ("127.0.0.1", "localhost")
SCHEMES: Final = ("http", "https", "socks4", "socks5", "socks5h")
MOST_SKEW_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class ProxyFacts:
    """Proxies that the environment names."""

    schemes: Mapping[str, str]
    """http, https, all → the scheme of the proxy's URL; "" where it has none."""
    taken: tuple[str, ...]
    """Names of this machine that programs would look for behind the proxy."""


def proxy_facts() -> ProxyFacts:
    """Read the environment as curl and Python do."""
    proxies = {name: url for name, url in urllib.request.getproxies().items() if name != "no"}
    schemes = {name: urllib.parse.urlsplit(url).scheme if "://" in url else "" for name, url in proxies.items()}
    return ProxyFacts(schemes, tuple(host for host in LOOPBACK if taken_by_proxy(f"http://{host}")))


def check_proxies(facts: ProxyFacts) -> list[Finding]:
    """Loopback is not looked for behind a proxy, and proxies are URLs."""
    found = []
    for name, scheme in facts.schemes.items():
        if scheme not in SCHEMES:
            says = f"{name}_proxy is no URL of a proxy: it must begin with http:// or socks5://"
            found.append(error("proxies", says, f"export {name}_proxy=http://HOST:PORT, or unset it"))
    if facts.taken:
        says = f"NO_PROXY leaves {' and '.join(facts.taken)} to the proxy: curl, Ray's commands and clients fail"
        found.append(
            warning("proxies", says, "export NO_PROXY=127.0.0.1,localhost,::1 no_proxy=127.0.0.1,localhost,::1")
        )
    return found or [
        ok("proxies", f"{', '.join(sorted(facts.schemes))}; not for loopback" if facts.schemes else "none")
    ]


@dataclass(frozen=True, slots=True)
class HubFacts:
    """How the Hugging Face Hub answers this machine."""

    endpoint: str
    offline: bool
    has_token: bool
    status: int | None
    """Of `GET /api/whoami-v2`, which says whether a token is known; None: no answer."""
    fault: str | None
    date: str | None
    """What its answer says the time is."""


def hub_facts() -> HubFacts:
    """Ask the Hub who this is, unless downloads are off."""
    from huggingface_hub import constants, get_token

    endpoint, token = constants.ENDPOINT, get_token()
    if constants.HF_HUB_OFFLINE:
        return HubFacts(endpoint, True, bool(token), None, None, None)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, UnicodeError) as failure:
        return HubFacts(endpoint, False, bool(token), None, str(failure) or type(failure).__name__, None)
    return HubFacts(endpoint, False, bool(token), answer.status_code, None, answer.headers.get("date"))


def check_hub(facts: HubFacts) -> list[Finding]:
    """Models can be downloaded, and a token is one that the Hub knows."""
    if facts.offline:
        return [ok("hub", "HF_HUB_OFFLINE is set: models are local or in the cache")]
    if facts.status is None:
        says = f"{facts.endpoint} cannot be reached ({facts.fault}): only models of this machine can be served"
        mend = "check the network and HTTPS_PROXY, name a mirror in HF_ENDPOINT, or set HF_HUB_OFFLINE=1"
        return [warning("hub", says, mend)]
    if facts.has_token and facts.status in (401, 403):
        says = f"{facts.endpoint} refuses the token of this user: every download fails, of public models, too"
        return [error("hub", says, "hf auth login, or unset HF_TOKEN")]
    return [ok("hub", f"{facts.endpoint} answers, {'with' if facts.has_token else 'without'} a token")]


@dataclass(frozen=True, slots=True)
class ClockFacts:
    """This machine's clock beside others: whose → seconds that this one is ahead."""

    ahead_s: Mapping[str, float]


def clock_facts(hub: HubFacts, port: int) -> ClockFacts:
    """Compare with the dates of answers: the Hub's, and a server's on this machine, which may be forwarded."""
    dates = {"the Hub": hub.date, "the server": _date_of(f"{url_of(LOOPBACK[0], port)}/health")}
    ahead = {whose: _ahead(date) for whose, date in dates.items() if date}
    return ClockFacts({whose: seconds for whose, seconds in ahead.items() if seconds is not None})


def check_clock(facts: ClockFacts) -> list[Finding]:
    """Certificates and tokens are valid by this clock."""
    found = []
    for whose, seconds in facts.ahead_s.items():
        if abs(seconds) > MOST_SKEW_S:
            way = "ahead of" if seconds > 0 else "behind"
            says = f"{abs(seconds):,.0f} s {way} {whose}'s: certificates may seem invalid, logs do not match"
            found.append(warning("clock", says, "timedatectl set-ntp true"))
    compared = f"as that of {' and '.join(facts.ahead_s)}" if facts.ahead_s else "nothing to compare it with"
    return found or [ok("clock", compared)]


def examine_network(subject: Subject) -> Sequence[Finding]:
    """Proxies, the Hub, the clock."""
    hub = hub_facts()
    return [*check_proxies(proxy_facts()), *check_hub(hub), *check_clock(clock_facts(hub, subject.port))]


def _date_of(url: str) -> str | None:
    try:
        with open_directly(url, TIMEOUT_S) as answer:
            return str(answer.headers["Date"] or "") or None
    except urllib.error.HTTPError as refusal:
        return refusal.headers["Date"]
    except (OSError, ValueError):
        return None


def _ahead(date: str) -> float | None:
    try:
        return time.time() - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
