"""A stand-in for the hub: one data set of given files over HTTP, as huggingface_hub asks for it."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "a" * 40


def serve_dataset(folder: Path, name: str) -> ThreadingHTTPServer:
    """Serve the files of a folder as the data set `name`. Its address is in `server_port`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, content: object) -> None:
            self.answer(json.dumps(content).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = f"/datasets/{name}/resolve/"
            if path.startswith(files):
                self._file(folder / path.removeprefix(files).partition("/")[2])
            elif path.startswith(f"/api/datasets/{name}/tree/"):
                self.answer_json([_facts(one) for one in sorted(folder.iterdir())])
            elif path in (f"/api/datasets/{name}", f"/api/datasets/{name}/revision/{SHA}"):
                siblings = [{"rfilename": one.name} for one in sorted(folder.iterdir())]
                self.answer_json({"id": name, "sha": SHA, "siblings": siblings})
            else:
                self.answer(b"", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            paths = [folder / one for one in asked.get("paths", [])]
            self.answer_json([_facts(one) for one in paths if one.is_file()])

        def _file(self, path: Path) -> None:
            if not path.is_file():
                self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
                return
            content = path.read_bytes()
            headers = {"ETag": f'"{path.name}"', "X_Repo_Commit": SHA}
            self.answer(content, **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _facts(path: Path) -> dict[str, object]:
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "b" * 40}


if __name__ == "__main__":
    server = serve_dataset(Path(sys.argv[1]), "me/mine")
    print(server.server_port, flush=True)
    threading.Event().wait()
