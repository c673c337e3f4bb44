"""`contextlm run --watch`: the run's page on this machine alone, while the run is at work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from contextlm.base.errors import InputError
from contextlm.base.progress import Progress
from contextlm.lab.run_folder import points_of
from contextlm.report.live import live_page

HOST = "127.0.0.1"
SECONDS = 5  # after which an open page asks again


@contextmanager
def watched(folder: Path, progress: Progress) -> Iterator[str]:
    """Serve the page of a run or grid for the time of the block; yields its address."""
    server = _Server((HOST, 0), partial(_Handler, directory=str(folder)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://{HOST}:{server.server_port}/"
    progress.line(f"watch it at {address}")
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of a fault, which a reader who leaves before the end is not."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(SimpleHTTPRequestHandler):
    """The page, made anew for each request, and the run folder's files, to which it links."""

    def do_GET(self) -> None:
        if self.path == "/":
            self._page()
        else:
            super().do_GET()

    def parse_request(self) -> bool:
        """Whether there is one to answer: a name that leads here by a trick is not ours."""
        if not super().parse_request():
            return False
        if self.headers.get("Host", "").partition(":")[0] in (HOST, "localhost"):
            return True
        self.send_error(HTTPStatus.FORBIDDEN)
        return False

    def _page(self) -> None:
        folder, status = Path(self.directory), HTTPStatus.OK
        try:
            content = live_page(folder, points_of(folder) or [folder])
        except (InputError, OSError) as error:  # read while it was written: it asks again
            status, content = HTTPStatus.SERVICE_UNAVAILABLE, escape(str(error))
        encoded = content.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(encoded)))
        self.send_header("Refresh", str(SECONDS))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: stderr is the run's."""
