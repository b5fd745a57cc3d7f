"""An OpenAI-compatible server on loopback that answers as a test tells it."""

import contextlib
import http.server
import json
import threading
import time

CAPTIONS = dict(short="a red ball rolls", detailed="A red ball rolls over a green floor.")


def completion(content, **more):
    """A response body with this answer."""
    choice = dict(index=0, message=dict(role="assistant", content=content), finish_reason="stop") | more
    return json.dumps(dict(choices=[choice], usage=dict(prompt_tokens=100, completion_tokens=20)))


class FakeEndpoint(http.server.ThreadingHTTPServer):
    """Answers requests in turn by `script`, and from then on by `then`.

    Entries are (status, body, headers), bodies of 200, or functions request -> one of these; a body may be an iterator
    of its parts. `requests` are those that came, `headers` likewise.
    """

    daemon_threads = True

    def __init__(self, *script, then=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.then = list(script), then or completion(json.dumps(CAPTIONS))
        self.requests, self.headers, self.lock = [], [], threading.Lock()
        self.delay = 0.0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what the tests are about


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append(body)
            server.headers.append(dict(self.headers) | dict(path=self.path))
            entry = server.script.pop(0) if server.script else server.then
        entry = entry(body) if callable(entry) else entry
        status, data, headers = entry if isinstance(entry, tuple) else (200, entry, {})
        time.sleep(server.delay)
        data = data.encode() if isinstance(data, str) else data
        length = {"Content-Length": str(len(data))} if isinstance(data, bytes) else {}
        self.send_response(status)
        for name, value in (length | headers).items():
            self.send_header(name, value)
        self.end_headers()
        for part in [data] if isinstance(data, bytes) else data:  # else as time goes by
            self.wfile.write(part)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(*script, then=None):
    """A FakeEndpoint that runs meanwhile."""
    server = FakeEndpoint(*script, then=then)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
