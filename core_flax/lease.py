"""One writer to a folder in a bucket, where no lock goes with the process that holds it.

The holder writes an object, and again every few seconds. Whoever finds it waits to see whether that goes on: if so
there is another writer, if not there was one, and the object is taken over. Each write is made on condition that the
object is still the one that was seen, so of two that would take it over one does. No two machines' clocks are compared.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import tensorstore as ts

from core_flax.signals import EXIT_PEER_LOST
from core_flax.types import UserError

RENEW_SECONDS = 10.0
LOST_SECONDS = 45.0
"""An object that has not been written for so long is nobody's: four writes have failed."""


@contextmanager
def leased(address: str, refusal: str) -> Iterator[None]:
    """Holds the object at ``address`` in this context.

    Raises:
      UserError: another process holds it (``refusal`` says so), or it cannot be written.
    """
    folder, _, name = address.rpartition("/")
    try:
        lease = _Lease(ts.KvStore.open(folder + "/").result(), name)
        lease.take(folder, refusal)
    except ValueError as error:  # TensorStore has no exception class of its own
        raise UserError(f"cannot write to {folder}: {str(error).partition(' [')[0]}") from error
    closed = threading.Event()
    thread = threading.Thread(target=lease.renew, args=(closed, address), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()
        lease.give_back()


class _Lease:
    def __init__(self, store: ts.KvStore, name: str) -> None:
        self._store, self._name = store, name
        self._generation = b""
        holder = {"host": socket.gethostname(), "process": os.getpid(), "id": uuid.uuid4().hex}  # containers' are alike
        self._holder = json.dumps(holder).encode()

    def take(self, folder: str, refusal: str) -> None:
        """Returns when the object is ours. Raises UserError if it is another's."""
        found = self._store.read(self._name).result()
        began, told = time.monotonic(), False
        while found.state != "missing" and time.monotonic() - began < LOST_SECONDS:
            if not told and time.monotonic() - began > 1.5 * RENEW_SECONDS:
                told, holder = True, found.value.decode(errors="replace")
                print(f"{folder} is in use by {holder}, or was; waiting to see which", file=sys.stderr, flush=True)
            time.sleep(RENEW_SECONDS / 10)
            again = self._store.read(self._name).result()
            if again.state != "missing" and again.stamp.generation != found.stamp.generation:
                raise UserError(refusal)
            found = again
        if not self._write(found.stamp.generation):
            raise UserError(refusal)

    def _write(self, generation: bytes) -> bool:
        """Writes the object if its generation is this one; False if another process has written it since.

        Of a write that was made and not answered TensorStore makes a second, which finds what the first has written.
        """
        stamp = self._store.write(self._name, self._holder, if_equal=generation).result()
        if not stamp.generation:
            found = self._store.read(self._name).result()
            if found.value != self._holder:
                return False
            stamp = found.stamp
        self._generation = stamp.generation
        return True

    def renew(self, closed: threading.Event, address: str) -> None:
        """Writes it again and again; ends the process should another have taken it, since two must not write."""
        while not closed.wait(RENEW_SECONDS):
            try:
                if self._write(self._generation):
                    continue
            except ValueError:  # a network that fails for a while: the next one may do
                continue
            line = f"error: {address} was taken by another run while this one could not be heard of; it ends"
            print(line, file=sys.stderr, flush=True)
            os._exit(EXIT_PEER_LOST)  # whoever starts it again is told by the other whether it still runs

    def give_back(self) -> None:
        """Deletes the object if it is ours; one that cannot be deleted is taken over in time."""
        try:
            self._store.write(self._name, None, if_equal=self._generation).result()
        except ValueError as error:
            print(f"cannot delete the lock {self._name}: {error}", file=sys.stderr)
