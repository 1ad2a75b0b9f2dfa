"""What the object stores of tests have in common: a server of this machine."""

import threading
from http.server import ThreadingHTTPServer


class FakeStore(ThreadingHTTPServer):
    """Serves `objects`, {bucket/key: bytes}, through `handler`, inside a `with`."""

    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.objects = {}
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)
