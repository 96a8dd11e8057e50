"""What stands between a client and its server: it counts round trips, and may hold back or delay the answers."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


class Between:
    """A way to the server at `url`. `num_trips` is how often a client spoke after the server had."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}/0"
        self.num_trips = 0
        self.delay_s = 0.0
        self.answers = threading.Event()
        self.answers.set()
        self._client_spoke = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for one in [self._listening, *self._sockets]:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection((str(self._target.hostname), int(self._target.port or 0)))
            self._sockets += [client, server]
            threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, is_client: bool) -> None:
        try:
            while content := source.recv(1 << 16):
                if is_client and not self._client_spoke:
                    self.num_trips += 1
                if not is_client:
                    self.answers.wait()
                    time.sleep(self.delay_s)
                self._client_spoke = is_client
                sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


@contextmanager
def between(url: str) -> Iterator[Between]:
    """One that is closed with the block."""
    way = Between(url)
    try:
        yield way
    finally:
        way.answers.set()
        way.close()
