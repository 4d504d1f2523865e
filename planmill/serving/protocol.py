"""uvicorn's HTTP over one connection, with an end to waiting and one form of refusal."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from planmill.serving.worker import refusal


class Protocol(H11Protocol):
    """A connection.

    uvicorn waits forever for a request's head, and for a client that does not read its answer. Here both have the time
    of an idle connection (`timeout_keep_alive`): a head must be whole that long after the connection was made or the
    last answer was sent, and an answer must get on in that time.
    """

    _due = 0.0
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._expect_head()
        self._arm()

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

    def on_response_complete(self) -> None:
        """After an answer: wait for the next head."""
        self._expect_head()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP as everything else is refused."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the answer is under way, or was sent
            self.transport.close()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # so that the application does not answer too
            self.cycle.message_event.set()
        status, kind, content = refusal(400, "the request is not valid HTTP")
        headers = [("Content-Type", kind), ("Content-Length", str(len(content))), ("Connection", "close")]
        events = (
            h11.Response(status_code=status, headers=headers, reason=b"Bad Request"),
            h11.Data(data=content),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event))
        self.transport.close()

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

    def _expect_head(self) -> None:
        self._due = self.loop.time() + self.timeout_keep_alive

    def _arm(self) -> None:
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_at(self._due, self.timeout_keep_alive_handler)
