"""`contextlm run --watch`: the run's page on this machine alone, while the run is at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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
    server = ThreadingHTTPServer((HOST, 0), partial(_Handler, directory=str(folder)))
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


class _Handler(SimpleHTTPRequestHandler):
    """The page, made anew for each request, and the run folder's files, to which it links."""

    def do_GET(self) -> None:
        # A name that leads here by a trick of its name server is not ours.
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path != "/":
            super().do_GET()
        else:
            folder = Path(self.directory)
            try:
                content = live_page(folder, points_of(folder) or [folder]).encode()
            except InputError as error:  # read while it was written
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Refresh", str(SECONDS))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: stderr is the run's."""
