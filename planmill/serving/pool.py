"""The way from the HTTP process to the workers on this machine: sockets in a private directory, two per worker.

Ray Serve starts the workers and replaces those that die; a call through its handle costs a few milliseconds of
processor time, which these sockets save. A message is its length and a pickle: both ends are ours, and only this user
can reach the directory.
"""

import asyncio
import os
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from planmill.serving.worker import Request, Response

CONNECTIONS = 2  # of a worker: one batch is decoded while another is computed
_LENGTH = struct.Struct("<Q")
_SUFFIX = ".sock"

Answer = Callable[[Sequence[Request]], list[Response]]


def listen(folder: Path, answer: Answer) -> threading.Thread:
    """Serve connections in threads, at a new socket in `folder`; the thread that accepts them lives as long as that."""
    name = f"{os.getpid()}-{os.urandom(4).hex()}"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(folder / name))
    sock.listen(2 * CONNECTIONS)
    os.rename(folder / name, folder / (name + _SUFFIX))  # whoever sees it can connect

    def accept() -> None:
        while True:
            connection, _ = sock.accept()
            threading.Thread(target=_serve, args=(connection, answer), daemon=True).start()

    thread = threading.Thread(target=accept, name="planmill connections", daemon=True)
    thread.start()
    return thread


def _serve(connection: socket.socket, answer: Answer) -> None:
    """Answer batches until the other side hangs up. What breaks it ends the connection, which the sender sees."""
    with connection, connection.makefile("rb") as incoming:
        while len(head := incoming.read(_LENGTH.size)) == _LENGTH.size:
            requests = pickle.loads(incoming.read(_LENGTH.unpack(head)[0]))
            content = pickle.dumps(answer(requests), pickle.HIGHEST_PROTOCOL)
            connection.sendall(_LENGTH.pack(len(content)) + content)


@dataclass(frozen=True)
class _Connection:
    name: str  # of the socket
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Pool:
    """Connections to the workers that there are; made and used in one event loop.

    Args:
        folder: where workers leave their sockets.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: asyncio.Queue[_Connection] = asyncio.Queue()  # in turns: every worker gets its share
        self._known: dict[str, int] = {}
        self._watcher: asyncio.Task | None = None

    @property
    def workers(self) -> int:
        """How many workers are connected."""
        return sum(1 for count in self._known.values() if count)

    async def __aenter__(self) -> "Pool":
        await self._connect()
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *ended: object) -> None:
        assert self._watcher is not None
        self._watcher.cancel()
        while not self._idle.empty():
            self._idle.get_nowait().writer.close()

    async def answer(self, requests: Sequence[Request]) -> list[Response]:
        """Have a worker answer a batch; waits while none is free.

        Raises:
            ConnectionError: the worker died before it answered.
        """
        connection = await self._idle.get()
        while connection.reader.at_eof():  # it died while it had nothing to do: nothing is lost
            self._drop(connection)
            connection = await self._idle.get()
        try:
            content = pickle.dumps(list(requests), pickle.HIGHEST_PROTOCOL)
            connection.writer.write(_LENGTH.pack(len(content)) + content)
            await connection.writer.drain()
            head = await connection.reader.readexactly(_LENGTH.size)
            answers: list[Response] = pickle.loads(await connection.reader.readexactly(_LENGTH.unpack(head)[0]))
        except (OSError, EOFError) as error:
            self._drop(connection)
            raise ConnectionError("the connection ended") from error
        except BaseException:  # given up on: the answer that may still come belongs to nobody
            self._drop(connection)
            raise
        self._idle.put_nowait(connection)
        return answers

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            for _ in range(self._idle.qsize()):
                connection = self._idle.get_nowait()
                if connection.reader.at_eof():  # its worker is gone
                    self._drop(connection)
                else:
                    self._idle.put_nowait(connection)
            await self._connect()

    async def _connect(self) -> None:
        """Connect to sockets that are new, or that lost a connection."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                while self._known.setdefault(path.name, 0) < CONNECTIONS:
                    await self._open(path)
            except OSError:
                if not self._known[path.name]:
                    path.unlink(missing_ok=True)  # its worker is gone
                    del self._known[path.name]

    async def _open(self, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
        self._known[path.name] += 1
        self._idle.put_nowait(_Connection(path.name, reader, writer))

    def _drop(self, connection: "_Connection") -> None:
        self._known[connection.name] -= 1
        connection.writer.close()
