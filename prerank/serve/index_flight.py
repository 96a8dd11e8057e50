"""An index host over Arrow Flight: candidates are columns of one record batch; the rest is small and in the ticket.

    DoGet(search)                   item_ids, similarity float32, and the values asked for, such as bids
    DoAction holding, load, unload  what it holds, by version with the models each index was built with

Flight was chosen over Arrow bytes in a message of Python's gRPC: it comes with pyarrow, and a round trip is shorter
(benchmarks/rollout.py). A search whose caller's deadline is over, or whose connection is gone, is ended; a caller that
stays cannot give a call up before its deadline.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import msgspec
import pyarrow as pa
import pyarrow.flight as flight
import structlog
import torch

from prerank.bundle.shard import Place
from prerank.errors import ConfigError, PrerankError, RequestError
from prerank.serve.callers import Callers
from prerank.serve.envelope import Refused
from prerank.serve.exposure import LOCAL, Exposure
from prerank.serve.host_tls import SCHEME, CallerTls, HostTls, why_not
from prerank.serve.hosts import parse_hosts
from prerank.serve.index_columns import ITEM_IDS, SIMILARITY, batch_of, columns_of, options_of, tensors_of
from prerank.serve.index_host import Found, Holding, HostFailed, IndexHost, NotHeld, Search, follow_live, hold_live
from prerank.serve.index_messages import (
    CHANGE,
    HOLDING,
    REFUSAL,
    TICKET,
    Change,
    HoldingMessage,
    Refusal,
    Ticket,
    encode,
)

_log = structlog.get_logger(__name__)

_OPTIONS = [  # a host that comes back is to be found within a second, not after two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
ACTIONS = {"holding": "what the host holds", "load": "hold a version too", "unload": "hold a version no more"}


class FlightServer(flight.FlightServerBase):  # type: ignore[misc]
    """`host` at an address and `port` (0: any that is free), listening from here on; `serve` waits for the end.

    Over TLS alone where there is `tls`; candidates are compressed where `is_compressed`. Raises ConfigError where the
    address cannot be listened on.
    """

    def __init__(
        self,
        host: IndexHost,
        address: str = "127.0.0.1",
        port: int = 0,
        exposure: Exposure = LOCAL,
        tls: HostTls | None = None,
        is_compressed: bool = True,
    ) -> None:
        self._host, self._exposure, self._callers = host, exposure, Callers()
        self._options = options_of(is_compressed)
        at = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        try:
            if tls is None:
                super().__init__(f"grpc://{at}")
            else:
                super().__init__(
                    f"{SCHEME}{at}",
                    tls_certificates=[(tls.cert, tls.key)],
                    verify_client=tls.client_ca is not None,
                    root_certificates=tls.client_ca,
                )
        except (pa.ArrowException, OSError):
            raise ConfigError(
                f"index-host cannot listen on {at}: expected an address of this machine and a port that is free; "
                "choose another with --port"
            ) from None

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.RecordBatchStream:
        """A search; see `IndexHost.search`."""
        try:
            search = TICKET.decode(ticket.ticket).search()
            if context.is_cancelled():
                raise HostFailed("the caller waits no more")
            with self._callers.waited_for(context.is_cancelled):
                found = self._host.search(search)
        except (PrerankError, msgspec.DecodeError) as error:
            raise _told(error) from None
        columns = columns_of(found.item_ids, {SIMILARITY: found.similarity, **found.values})
        batch = batch_of(columns, {"version": found.version, "num_eligible": str(found.num_eligible)})
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(batch.schema, [batch]), self._options)

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> Iterator[flight.Result]:
        """One of ACTIONS; each answers with what is then held."""
        try:
            if action.type not in ACTIONS:
                raise RequestError(f"action: expected one of {list(ACTIONS)}, got {action.type!r}")
            if action.type != "holding":
                change = CHANGE.decode(action.body.to_pybytes())
                # without one only this machine calls, where no browser speaks Flight, or who shows a certificate
                if self._exposure.token is not None:
                    self._exposure.check_changes({"authorization": change.authorization})
                (self._host.load if action.type == "load" else self._host.unload)(change.version)
            answer = encode(HoldingMessage.made_of(self._host.holding()))
        except (PrerankError, msgspec.DecodeError) as error:
            raise _told(error) from None
        yield flight.Result(answer)

    def list_actions(self, context: flight.ServerCallContext) -> Sequence[tuple[str, str]]:
        """ACTIONS."""
        return list(ACTIONS.items())


def _told(error: Exception) -> flight.FlightError:
    match error:
        case NotHeld():
            return flight.FlightServerError(
                str(error), encode(Refusal("NotHeld", HoldingMessage.made_of(error.holding)))
            )
        case Refused():
            return flight.FlightUnauthenticatedError(str(error), encode(Refusal(error.kind)))
        case msgspec.DecodeError():
            return flight.FlightServerError(f"malformed: {error}", encode(Refusal("RequestError")))
        case _:
            return flight.FlightServerError(str(error), encode(Refusal(type(error).__name__)))


class FlightHost:
    """The index host at "host:port", or at "grpc+tls://host:port" by `tls`. Threads may share one.

    `token` is what `load` and `unload` show.
    """

    def __init__(self, address: str, token: str | None = None, tls: CallerTls | None = None) -> None:
        self.address, self._authorization = address, "" if token is None else f"Bearer {token}"
        shown = {}
        if address.startswith(SCHEME) and tls is not None:
            shown = {"tls_root_certs": tls.ca, "cert_chain": tls.cert, "private_key": tls.key}
        where = address if "://" in address else f"grpc://{address}"
        self._client = flight.FlightClient(where, generic_options=_OPTIONS, **shown)

    def holding(self, timeout_s: float | None = None) -> Holding:
        """See `AsksHost.holding`."""
        return self._act("holding", b"", timeout_s)

    def load(self, version: str, timeout_s: float | None = None) -> Holding:
        """See `IndexHost.load`; what it holds then. Raises RequestError where it refuses, HostFailed."""
        return self._act("load", encode(Change(version, self._authorization)), timeout_s)

    def unload(self, version: str, timeout_s: float | None = None) -> Holding:
        """See `IndexHost.unload`; what it holds then. Raises RequestError where it refuses, HostFailed."""
        return self._act("unload", encode(Change(version, self._authorization)), timeout_s)

    def search(self, search: Search, timeout_s: float | None = None) -> Found:
        """See `AsksHost.search`."""
        ticket = flight.Ticket(encode(Ticket.of(search)))
        try:
            table = self._client.do_get(ticket, _within(timeout_s)).read_all()
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            raise self._understood(error) from None
        said, found = table.schema.metadata or {}, tensors_of(table, search.values)
        if found is None or not {b"version", b"num_eligible"} <= set(said):
            wanted = [ITEM_IDS, SIMILARITY, *search.values]
            raise HostFailed(f"{self.address}: expected candidates as {wanted}, got {table.schema}")
        item_ids, similarity, values = found
        return Found(said[b"version"].decode(), item_ids, similarity, int(said[b"num_eligible"]), values)

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def _act(self, verb: str, body: bytes, timeout_s: float | None) -> Holding:
        try:
            answers = list(self._client.do_action(flight.Action(verb, body), _within(timeout_s)))
            return HOLDING.decode(answers[0].body).holding()
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            raise self._understood(error) from None
        except (msgspec.DecodeError, IndexError) as error:
            raise HostFailed(f"{self.address}: answered {verb} with something else: {error}") from None

    def _understood(self, error: Exception) -> PrerankError:
        why = str(error).partition(". Detail: ")[0].partition(". gRPC client")[0]
        said = f"{self.address}: {why_not(self.address, why)}"
        extra = getattr(error, "extra_info", b"")
        if not extra:
            return HostFailed(said)
        try:
            refusal = REFUSAL.decode(extra)
        except msgspec.DecodeError:
            return HostFailed(said)
        if refusal.holding is not None:
            return NotHeld(said, refusal.holding.holding())
        return HostFailed(said) if refusal.kind == "HostFailed" else RequestError(why)


def _within(timeout_s: float | None) -> flight.FlightCallOptions:
    return flight.FlightCallOptions(timeout=timeout_s)


def open_hosts(said: str, token: str | None = None, tls: CallerTls | None = None) -> list[list[FlightHost]]:
    """The replicas of each shard, of a list as `parse_hosts` reads it; none is asked yet.

    Raises ConfigError for a list that is wrong, and for `tls` where none of it speaks TLS.
    """
    shards = parse_hosts(said)
    if tls is not None and not any(one.startswith(SCHEME) for replicas in shards for one in replicas):
        raise ConfigError(f"{said}: no host is listed as {SCHEME}host:port, and only to those certificates are shown")
    return [[FlightHost(one, token, tls) for one in replicas] for replicas in shards]


def serve_index_host(
    store: Path,
    place: Place,
    *,
    host: str = "127.0.0.1",
    port: int = 8815,
    most: int = 2,
    follow: bool = True,
    token_file: Path | None = None,
    threads: int = 1,
    tls: HostTls | None = None,
    is_compressed: bool = True,
) -> None:
    """Serve shard `place` of the funnel at `store` until a signal ends it, and searches that run have ended.

    It holds the version that is live and each that is promoted later, at most `most` at once; without `follow` what
    `load` tells it alone. A search uses `threads` threads, and what it finds is compressed where `is_compressed`;
    `token_file` is as `Exposure.of`'s. It speaks TLS alone where there is `tls`, and needs no token where that says
    whose certificates callers show. Raises ConfigError for an address that cannot be listened on, or that needs a
    token. A version that cannot be loaded is logged, and tried again each minute.
    """
    exposure = Exposure.of(host, token_file, are_known=tls is not None and tls.client_ca is not None)
    ended = threading.Event()
    torch.set_num_threads(threads)
    one = IndexHost(store, place, most)
    if follow:
        hold_live(one)
    server = FlightServer(one, host, port, exposure, tls, is_compressed)

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    _log.info("index host listens", shard=place.number, of=place.of, host=host, port=server.port, tls=tls is not None)
    watching = threading.Thread(target=follow_live, args=(one, ended), name="live-version", daemon=True)
    if follow:
        watching.start()
    try:
        while not ended.wait(1.0):
            pass
    finally:
        server.shutdown()
        _log.info("index host ends", shard=place.number, of=place.of)
