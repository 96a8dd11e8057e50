"""A round trip of 10,000 candidates to another process, as columns: Arrow Flight, and Arrow bytes in Python's gRPC."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pyarrow as pa
import pyarrow.flight as flight

from benchmarks.machine import REPOSITORY, times_ms
from benchmarks.result import Row

CALLS, QUICK_CALLS = 2_000, 200
NUM = 10_000
_QUERY = b"q" * 400
_COLUMNS = """
import numpy as np, pyarrow as pa, sys
ids, similarity = np.arange(10_000, dtype=np.int64), np.zeros(10_000, np.float32)
def batch():
    return pa.record_batch({"item_ids": pa.array(ids), "similarity": pa.array(similarity)})
SCHEMA = batch().schema
"""
_FLIGHT = (
    _COLUMNS
    + """
import pyarrow.flight as flight
class Server(flight.FlightServerBase):
    def do_get(self, context, ticket):
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(SCHEMA, [batch()]))
server = Server("grpc://127.0.0.1:0")
print(server.port, flush=True)
server.serve()
"""
)
_GRPC = (
    _COLUMNS
    + """
import grpc
from concurrent.futures import ThreadPoolExecutor
def search(request, context):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(batch())
    return sink.getvalue().to_pybytes()
server = grpc.server(ThreadPoolExecutor(4))
verbs = {"search": grpc.unary_unary_rpc_method_handler(search)}
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("host", verbs),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
server.wait_for_termination()
"""
)


def wire_rows(is_quick: bool) -> Iterator[Row]:
    """Interleaved, ten turns each."""
    has_grpc = find_spec("grpc") is not None
    codes = {"Arrow Flight": _FLIGHT, **({"Arrow bytes in gRPC": _GRPC} if has_grpc else {})}
    servers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for code in codes.values()
    ]
    try:
        ports = [int(one.stdout.readline()) for one in servers if one.stdout is not None]
        calls = [_flight(ports[0]), *([_grpc(ports[1])] if has_grpc else [])]
        spent: list[list[float]] = [[] for _ in calls]
        for _ in range(10):
            for own, call in zip(spent, calls, strict=True):
                own += times_ms(call, (QUICK_CALLS if is_quick else CALLS) // 10, warm_up=5)
    finally:
        for one in servers:
            one.kill()
            one.wait()
            if one.stdout is not None:
                one.stdout.close()
    for name, own in zip(codes, spent, strict=True):
        yield Row.timed(f"round trip of {NUM:,} candidates, {name}", own, NUM)
    if not has_grpc:
        yield Row.skipped("round trip, Arrow bytes in gRPC", "no grpcio")


def _flight(port: int) -> Callable[[], None]:
    client = flight.connect(f"grpc://127.0.0.1:{port}")

    def call() -> None:
        table = client.do_get(flight.Ticket(_QUERY), flight.FlightCallOptions(timeout=10.0)).read_all()
        assert table.num_rows == NUM

    return call


def _grpc(port: int) -> Callable[[], None]:
    import grpc

    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1)])
    search = channel.unary_unary("/host/search")

    def call() -> None:
        answer = search(_QUERY, timeout=10.0)
        assert pa.ipc.open_stream(pa.py_buffer(answer)).read_all().num_rows == NUM

    return call
