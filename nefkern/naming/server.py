"""The atlas on the loopback interface, where it can save names itself.

A page of any other origin can make a browser send requests here, and a name of its own may lead
here (DNS rebinding). So a request must name this host as Host, and as Origin where it has one; what
changes a file must be JSON, which other origins may not send without being asked first.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from nefkern.naming.names import Names, parse_names, write_names
from nefkern.runtime.errors import UserError, first_line
from nefkern.runtime.structured import parse_json

log = logging.getLogger(__name__)

HOST = "127.0.0.1"

#: Bytes of names that are taken at once.
MOST = 1 << 20

_SECURE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class AtlasServer(ThreadingHTTPServer):
    """Serves the page and saves its names.

    Args:
        port: to listen at; 0 takes a free one.
        page: makes the page with the names given.
        names: those it begins with.
        path: the file they are saved to.

    Raises:
        UserError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, page: Callable[[Names], str], names: Names, path: Path) -> None:
        self.page, self.names, self.path, self.lock = page, names, path, Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: cannot be listened at ({first_line(error)})") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away early is no news; anything else is told in a line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            log.warning("a request failed: %s: %s", type(error).__name__, first_line(error))

    @property
    def hosts(self) -> set[str]:
        """What a request may name as its host."""
        return {f"{host}:{self.server_port}" for host in (HOST, "localhost")}

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def save(self, content: Any) -> Names:
        """Check names and write them; a UserError if they are not some of this run's clusters."""
        names = parse_names(content, "names")
        names.require_run("names", self.names.num_clusters, self.names.checkpoint or "")
        with self.lock:
            write_names(self.path, names)
            self.names = names
        return names


class _Handler(BaseHTTPRequestHandler):
    server: AtlasServer
    timeout = 30
    server_version, sys_version = "nefkern", ""

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path == "/":
            self._answer(HTTPStatus.OK, self.server.page(self.server.names), "text/html")
        elif self.path == "/names.yaml":
            text = yaml.safe_dump(self.server.names.as_dict(), sort_keys=False, allow_unicode=True)
            self._answer(HTTPStatus.OK, text)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "no such page")

    def do_POST(self) -> None:
        if not self._allowed():
            return
        if self.path != "/names":
            self._answer(HTTPStatus.NOT_FOUND, "no such page")
            return
        if self.headers.get_content_type() != "application/json":
            self._answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
            return
        length = self.headers.get("Content-Length", "")
        digits = length.isascii() and length.isdecimal() and len(length) < 20
        if not (digits and int(length) <= MOST):
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MOST} bytes")
            return
        try:
            names = self.server.save(parse_json(self.rfile.read(int(length))))
        except (UserError, ValueError) as error:
            self._answer(HTTPStatus.BAD_REQUEST, first_line(error))
        except OSError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"cannot write: {error.strerror}")
        else:
            text = f"{len(names.names)} clusters named, saved to {self.server.path}"
            log.info("%s", text)
            self._answer(HTTPStatus.OK, text)

    def _allowed(self) -> bool:
        """Whether it is this server that is meant; else the answer is given."""
        hosts, origin = self.server.hosts, self.headers.get("Origin")
        given = self.headers.get_all("Host", [])
        known = len(given) == 1 and given[0] in hosts
        if known and origin in (None, f"http://{given[0]}"):
            return True
        self._answer(HTTPStatus.FORBIDDEN, "expected this server's own address as Host and Origin")
        return False

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for key, value in _SECURE.items():
            self.send_header(key, value)
        if status != HTTPStatus.OK:
            self.close_connection = True
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Not every request: what is saved is told."""
