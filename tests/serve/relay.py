"""A port before the server's, by which tests lose, hold up or slow down a connection."""

import socket
import threading


class Relay:
    """Passes bytes on, but loses its first connections, drips its answers, or holds all up."""

    def __init__(self, target: str, *, lose: int = 0, drip: bool = False) -> None:
        host, port = target.split(":")
        self.target, self.lose, self.drip = (host, int(port)), lose, drip
        self.accepted, self.sockets = 0, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.done, self.open = threading.Event(), threading.Event()
        self.open.set()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                inner, _ = self.listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self.accepted <= self.lose:
                inner.close()
                continue
            outer = socket.create_connection(self.target)
            self.sockets += [inner, outer]
            for source, sink in ((inner, outer), (outer, inner)):
                slow = self.drip and source is outer
                threading.Thread(target=self.pipe, args=(source, sink, slow), daemon=True).start()

    def pipe(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        try:
            while block := source.recv(1 if slow else 1 << 16):
                if slow and self.done.wait(0.1):
                    return
                self.open.wait()
                sink.sendall(block)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        self.done.set()
        self.open.set()
        for sock in (self.listener, *self.sockets):
            sock.close()
