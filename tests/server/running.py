"""A real server in a thread of this process."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from perl.server.listen import address_of, open_port, server_of


@contextlib.contextmanager
def serving(app: Callable[..., object], port: int = 0) -> Iterator[str]:
    """Run the server inside this context; yield its address."""
    listening, server = open_port("127.0.0.1", port), server_of(app)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield address_of(listening)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
