"""A page at an address of this machine, made anew when the files behind it change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nanorlhf.errors import UsageError

HOME = "127.0.0.1"  # samples are nobody else's business
FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl")


def stamp(folders: Sequence[Path]) -> str:
    """Something that changes whenever a run writes."""
    files = [folder / name for folder in folders for name in FILES]
    stats = [file.stat() for file in files if file.exists()]
    return "-".join(f"{s.st_size:x}.{s.st_mtime_ns:x}" for s in stats)


class Server(ThreadingHTTPServer):
    """Serves the newest page, and the stamp by which an open one learns that it is old."""

    daemon_threads = True

    def __init__(self, make: Callable[[], str], mark: Callable[[], str], port: int) -> None:
        super().__init__((HOME, port), Handler)
        self.make, self.mark = make, mark
        self.page, self.made_at, self.lock = b"", "", threading.Lock()

    def newest(self) -> bytes:
        """The page, made anew if something was written since."""
        with self.lock:
            now = self.mark()
            if now != self.made_at or not self.page:
                self.page, self.made_at = self.make().encode("utf-8", "replace"), now
            return self.page


class Handler(BaseHTTPRequestHandler):
    """Answers its own machine, asked by its own name: a stranger's page cannot have it read under another."""

    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOME}:{port}", f"localhost:{port}"):
            self.send_error(403)
        elif self.path == "/":
            self.answer(self.server.newest(), "text/html; charset=utf-8")
        elif self.path == "/stamp":
            self.answer(self.server.mark().encode(), "text/plain")
        else:
            self.send_error(404)

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Says nothing of every look."""


def serve(make: Callable[[], str], mark: Callable[[], str], port: int) -> None:
    """Until Ctrl-C."""
    try:
        server = Server(make, mark, port)
    except (OSError, OverflowError) as error:
        raise UsageError(f"port {port}: {getattr(error, 'strerror', None) or error}; --port says another") from None
    with server:
        server.newest()  # what is wrong with the runs is said here
        try:
            print(f"http://{HOME}:{server.server_address[1]}/ follows; Ctrl-C ends it", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print()
