"""A hub on the loopback interface: serves files as a hub does, and does whatever goes wrong on the way, on purpose."""
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" * 6 + "c0de"


def hub_environment(url, folder):
    "What tells a process to use the hub at `url`, with a cache of its own in a folder."
    return {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder/"hf"), "NO_PROXY": "127.0.0.1"}


class Hub:
    """Any repository `owner/name` exists, and holds the files of `folder`.

    `fault(repo, name, method)` says what goes wrong with a request: None, an HTTP status, or a pair of one of
    "cut" (the connection ends after so many bytes), "flip" (a wrong byte at that place), "stall" (so many seconds of silence in the middle),
    "long" and "short" (the stated length is off by so many bytes).
    """
    def __init__(self, folder, fault=lambda repo, name, method: None, bytes_per_second=None):
        self.folder, self.fault, self.bytes_per_second = folder, fault, bytes_per_second
        self.requests = [] # (method, repository, file, first byte)
        self.hold = lambda name: None # called before a file is sent
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *args): pass
            def do_HEAD(self): self.answer()
            def do_GET(self): self.answer()
            def answer(self):
                try: hub.answer(self)
                except (BrokenPipeError, ConnectionResetError): self.close_connection = True # the client was killed

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def gets(self): return sorted(name for method, _, name, _ in self.requests if method == "GET")

    def answer(self, request):
        parts = request.path.strip("/").split("/") # datasets/owner/name/resolve/revision/path…
        repo, name = "/".join(parts[1:3]), "/".join(parts[5:])
        wanted = request.headers.get("Range")
        start = int(wanted[6:].split("-")[0]) if wanted else 0
        file, head = self.folder/name, request.command == "HEAD"
        if parts[0] == "datasets": self.requests.append((request.command, repo, name, start))
        if parts[0] != "datasets" or parts[4] not in ("main", COMMIT) or not file.is_file(): return self.refuse(request, 404, "EntryNotFound")
        fault = self.fault(repo, name, request.command)
        if isinstance(fault, int): return self.refuse(request, fault)
        what, n = fault or (None, 0)
        if not head: self.hold(name)
        data = file.read_bytes()
        sha = hashlib.sha256(data).hexdigest()
        body = bytearray(data[start:])
        if what == "flip" and body: body[n % len(body)] ^= 1
        stated = max(0, len(body) + {"long": n, "short": -n}.get(what, 0))
        request.send_response(206 if wanted else 200)
        for key, value in {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": len(data), "Accept-Ranges": "bytes", "Content-Length": stated}.items():
            request.send_header(key, str(value))
        if wanted: request.send_header("Content-Range", f"bytes {start}-{start + stated - 1}/{start + stated}")
        request.end_headers()
        if head: return
        if what == "short": body = body[:stated]
        if what in ("cut", "long"): request.close_connection = True
        if what == "cut": body = body[:n % (len(body) + 1)]
        middle = len(body) // 2 if what == "stall" else 0
        for i in range(0, len(body), 1 << 16):
            if middle and i + (1 << 16) > middle:
                request.wfile.write(body[i:middle])
                request.wfile.flush()
                time.sleep(n)
                request.wfile.write(body[middle:i + (1 << 16)])
                middle = 0
            else: request.wfile.write(body[i:i + (1 << 16)])
            if self.bytes_per_second: time.sleep((1 << 16) / self.bytes_per_second)

    @staticmethod
    def refuse(request, status, code=None):
        request.send_response(status)
        if code: request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()
