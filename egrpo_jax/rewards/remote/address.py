"""The address of a remote reward, as it goes over the wire."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from urllib.parse import SplitResult, quote, urlsplit

from egrpo_jax.common.errors import ConfigError

_EXPECTED = (
    "http://host:port/path, or https, without spaces, a user's name, # or an IPv6 zone; a host's name with ß or ς in "
    "its xn-- form"
)
_HOST = re.compile(r"[a-z0-9_-][a-z0-9_.-]*")
_KEPT = "!$%&'()*+,/:;=?@"  # has a meaning there, or stands for another character already


def ascii_url(url: str) -> str:
    """Spells `url` in ASCII: its host by IDNA, what follows percent-encoded.

    Raises:
      ConfigError: it is no such address; the message shows neither a password nor what follows a question mark.
    """
    try:
        return _spelled(urlsplit(url)) if url.isprintable() and " " not in url else _refuse()
    except ValueError:
        shown = re.sub("//.*@", "//...@", url.partition("?")[0])
        raise ConfigError("url", shown, _EXPECTED) from None


def _spelled(parts: SplitResult) -> str:
    """The parts put together again. Raises ValueError."""
    if parts.scheme not in ("http", "https") or "@" in parts.netloc or parts.fragment or parts.port == 0:
        _refuse()
    host = _host(parts.hostname or "", "[" in parts.netloc)
    netloc = host if parts.port is None else f"{host}:{parts.port}"
    path, query = quote(parts.path, _KEPT), quote(parts.query, _KEPT)
    return parts._replace(netloc=netloc, path=path, query=query).geturl()


def _host(host: str, bracketed: bool) -> str:
    """The host in ASCII. Raises ValueError."""
    if bracketed:
        return f"[{ipaddress.IPv6Address(host)}]" if "%" not in host else _refuse()
    spelled = host.encode("idna").decode()
    # Python's IDNA is that of 2003, which turns a sharp s into ss: another host today.
    known = host.isascii() or spelled.encode().decode("idna") == unicodedata.normalize("NFKC", host)
    return spelled if known and _HOST.fullmatch(spelled) else _refuse()


def _refuse() -> str:
    raise ValueError
