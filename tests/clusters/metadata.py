"""The metadata service of a spot machine at AWS and at Google Cloud, on this machine: what cluster/notice.py asks."""

import json
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

_TOKEN = "token-of-this-machine"


class Metadata(ThreadingHTTPServer):
    """Use as a context. It refuses what the clouds refuse: AWS who has no token, Google who does not name it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked = 0  # times
        self.broken = False
        self.ends: datetime | None = None

    def __enter__(self) -> "Metadata":
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def notice(self, seconds: float) -> None:
        """The machine is taken away in so many seconds."""
        self.ends = datetime.fromtimestamp(time.time() + seconds, UTC)


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._say(*((200, _TOKEN) if known else (400, "")))

    def do_GET(self) -> None:
        ends = self.server.ends
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != _TOKEN:
                self._say(401, "")
            elif ends is None:
                self._say(404, "")
            else:
                self._say(200, json.dumps({"action": "terminate", "time": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}))
        elif self.path == "/computeMetadata/v1/instance/preempted":
            named = self.headers["Metadata-Flavor"] == "Google"
            self._say(*((200, "FALSE" if ends is None else "TRUE") if named else (403, "")))
        else:
            self._say(404, "")

    def _say(self, status: int, text: str) -> None:
        self.server.asked += 1
        self.send_response(503 if self.server.broken else status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        return
