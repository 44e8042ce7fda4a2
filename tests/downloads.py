"""Files to download, damaged ones, and servers of both."""

import contextlib
import hashlib
import http.server
import threading

from lrnde.data._sources import File


def describe(name, content, size=True):
    digest = hashlib.sha256(content).hexdigest()
    return File(name, len(content) if size else None, digest)


def flip(content):
    """One bit changed in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "corrupt": flip,
    "too long": lambda content: content + b"\0",
    "another file": lambda content: b"<html>Please log in</html>",
}


def write_all(folder, contents):
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Server:
    """Serves the given files over HTTP; `requests` lists the names asked for.

    A name in `dying` is announced at full length, but the connection breaks half-way.
    """

    def __init__(self, contents, dying=()):
        self.contents, self.dying, self.requests = contents, dying, []

    def respond(self, handler):
        name = handler.path.rpartition("/")[2]
        self.requests.append(name)
        if name not in self.contents:
            return handler.send_error(404)
        content = self.contents[name]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        half = len(content) // 2 if name in self.dying else len(content)
        handler.wfile.write(content[:half])

    @contextlib.contextmanager
    def listen(self):
        """Serves on this machine for a while, at the address it gives."""

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                self.respond(handler)

            def log_message(handler, format, *args):
                del format, args

        listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.server_port}/files/"
        finally:
            listener.shutdown()
            thread.join()
            listener.server_close()
