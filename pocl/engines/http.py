"""Questions to a server over HTTP: patient where it is busy or away, and brief where it refuses."""

from __future__ import annotations

import json
import os
import urllib.parse
from typing import Any, NoReturn

import urllib3

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_QUOTED = 300  # characters of what a server says


class ServerError(OSError):
    """The server cannot be reached, does not answer, or refuses; the message says what to do."""


class Client:
    """Asks one server, from any number of threads.

    Args:
        url: `http://host:port`, with or without `/v1`.
        api_key_env: name of the environment variable that holds the key; None sends none.
        connections: kept open.
        timeout: seconds to wait for an answer.
        retries: attempts after the first, where the server is away or busy, each waiting twice as long as the one
            before, up to a minute, and as long as its `Retry-After` says.
        backoff: seconds of the second wait; the first is none.

    Raises:
        ValueError: the URL is none, holds a key, or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str | None = None,
        connections: int = 1,
        timeout: float = 600.0,
        retries: int = 12,
        backoff: float = 0.5,
    ) -> None:
        self.url = _checked(url)
        self.timeout = timeout
        self._key = None
        if api_key_env is not None:
            self._key = os.environ.get(api_key_env)
            if not self._key:
                raise ValueError(
                    f"api_key_env names the environment variable {api_key_env}, which is not set; export it, or leave "
                    "api_key_env out where the server wants no key"
                )
        patience = urllib3.Retry(
            total=retries,
            backoff_factor=backoff,
            backoff_max=60,
            status_forcelist=_BUSY,
            allowed_methods=None,  # a question asked twice does no harm
            raise_on_status=False,
            redirect=False,
        )
        waits = urllib3.Timeout(connect=min(timeout, 30.0), read=timeout)
        self._pool = urllib3.PoolManager(maxsize=connections, block=True, retries=patience, timeout=waits)

    def ask(self, path: str, question: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a POST of JSON, or to a GET.

        Raises:
            ServerError: see there.
        """
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        method = "GET" if question is None else "POST"
        try:
            reply = self._pool.request(method, f"{self.url}{path}", json=question, headers=headers, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            self._refuse(error)
        if reply.status != 200:
            self._tell(reply.status, path, reply.data)
        try:
            content = json.loads(reply.data)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ServerError(
                f"the server at {self.url} answers {path} with no JSON object ({self._quoted(reply.data)}); give the "
                "URL of an OpenAI-compatible server"
            )
        return content

    def close(self) -> None:
        self._pool.clear()

    def _refuse(self, error: Exception) -> NoReturn:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, urllib3.exceptions.ReadTimeoutError):
            said = (
                f"does not answer within {self.timeout:g} s; ask fewer at a time (in_flight), or wait longer (timeout)"
            )
        else:
            said = f"cannot be reached ({type(reason).__name__}); start it, or correct the URL"
        raise ServerError(
            f"the server at {self.url} {said}. Whole shards of what it said are kept: the same call goes on from there"
        ) from None

    def _tell(self, status: int, path: str, body: bytes) -> NoReturn:
        if status in (401, 403):
            raise ServerError(
                f"the server at {self.url} wants another key (HTTP {status}); set api_key_env to the name of the "
                "environment variable that holds it"
            )
        if status in _BUSY:
            raise ServerError(
                f"the server at {self.url} is still busy or broken after all attempts (HTTP {status}: "
                f"{self._quoted(body)}). Whole shards of what it said are kept: the same call goes on from there"
            )
        raise ServerError(f"the server at {self.url} refuses {path} (HTTP {status}): {self._quoted(body)}")

    def _quoted(self, body: bytes) -> str:
        text = " ".join(body.decode("utf-8", "replace").split())
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _checked(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"server must be a URL such as http://localhost:8000, got {url!r}")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "server must be a URL without user, password or query: keys come from the environment (api_key_env), so "
            "that they get into no file"
        )
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"
