"""An OpenAI-compatible server on a thread of the tests' process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer:
    """Serves `models` and what `answer(path, asked)` returns: a status and a body.

    A body that is text is sent as it is. Requests of one server are answered one after the other
    where `answer` takes `lock`.
    """

    def __init__(self, models):
        self.lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, status, content):
                plain = isinstance(content, str)
                body = content.encode() if plain else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if plain else "application/json")
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.reply(200, {"object": "list", "data": models})

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(*outer.answer(self.path, asked))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
