"""uvicorn's HTTP over one connection, with an end to waiting, a number of connections, and one form of refusal.

uvicorn's `limit_concurrency` is asked only once a request's head is whole: connections that never send one fill the
process until it has no file descriptor left.
"""

import asyncio
from collections import OrderedDict
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from planmill.serving.worker import refusal


class Room:
    """The connections that there may be.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        # For their client, the one that does so longest first.
        self.waiting: OrderedDict[Protocol, None] = OrderedDict()


class Protocol(H11Protocol):
    """A connection.

    uvicorn waits forever for a request's head, and for a client that does not read its answer. Here both have the time
    of an idle connection (`timeout_keep_alive`): a head must be whole that long after the connection was made or the
    last answer was sent, and an answer must get on in that time.

    Where the room is full, a new connection takes the place of the one that has waited longest for its client: for a
    whole request, for the next, or for it to read. Nobody loses an answer that is still being made.

    A server has its own subclass, made by `bounded`: uvicorn makes the objects.
    """

    room: Room
    _due = 0.0
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._expect_head()
        self._arm()
        if len(self.connections) > self.room.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.room.waiting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._arm()  # whatever came, the head is due when it was

    def handle_events(self) -> None:
        """Act on what was received."""
        try:
            super().handle_events()
        except ValueError:  # h11 0.16 makes a number of any Content-Length, and Python refuses one of 5000 digits
            self.send_400_response("Invalid HTTP request received.")
        if self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
            self.room.waiting.pop(self, None)  # the request is whole: now it is our turn

    def on_response_complete(self) -> None:
        """After an answer: wait for the next head."""
        self._expect_head()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP as everything else is refused."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the answer is under way, or was sent
            self.transport.close()
            return
        self._disown()
        self._refuse(400, "the request is not valid HTTP")

    def timeout_keep_alive_handler(self) -> None:
        """The time is over."""
        left = self.transport.get_write_buffer_size()
        if not left:
            super().timeout_keep_alive_handler()
        elif 0 < self._unsent <= left:
            self.transport.abort()
        else:  # it gets on: look again
            self._unsent = left
            self.timeout_keep_alive_task = None
            self._expect_head()
            self._arm()

    def _make_room(self) -> None:
        """Hang up on the client that has been waited for longest; where each has sent a whole request, on this one."""
        longest = next(iter(self.room.waiting))
        if longest is self:
            self._refuse(503, f"{self.room.most} requests are under way: try again later")
        else:
            longest._disown()
            longest.transport.abort()
        self.room.waiting.pop(longest)
        self.connections.discard(longest)  # counted no more, though its end is only scheduled

    def _disown(self) -> None:
        """Tell the application that nobody waits for its answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application, and hang up."""
        _, kind, content = refusal(status, message)
        headers = [("Content-Type", kind), ("Content-Length", str(len(content))), ("Connection", "close")]
        events = (
            h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()),
            h11.Data(data=content),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _expect_head(self) -> None:
        self._due = self.loop.time() + self.timeout_keep_alive
        self.room.waiting[self] = None
        self.room.waiting.move_to_end(self)

    def _arm(self) -> None:
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_at(self._due, self.timeout_keep_alive_handler)


def bounded(most: int) -> type[Protocol]:
    """The protocol of a server that has at most that many connections."""

    class Bounded(Protocol):
        room = Room(most)

    return Bounded
