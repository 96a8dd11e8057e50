"""The ranking stage as a model of the Open Inference Protocol v2, whichever way its messages come.

The model has the funnel's name and one version, the one that serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import structlog

from prerank import __version__
from prerank._toml import nearest
from prerank.errors import DeadlineExceeded, PrerankError, RequestError
from prerank.serve.envelope import told
from prerank.serve.graph import StageReport
from prerank.serve.ranking import MOST_USERS, Ranking
from prerank.serve.ranking_tensors import Candidates, RankingTensors, TensorSpec
from prerank.serve.seen import current
from prerank.serve.statistics import Statistics, Took
from prerank.serve.tensors import NamedTensor

_log = structlog.get_logger(__name__)
T = TypeVar("T")
Plain: TypeAlias = dict[str, object]
"""An object as JSON and protobuf's JSON form have it."""

PLATFORM = "prerank_ranking"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters", "statistics")
_PARAMETERS = ("k", "timeout", "priority")


class UnknownModel(RequestError):
    """There is no such model, or no such version of it, here."""


def told_by_protocol(error: Exception, request_id: str) -> tuple[int, str, str]:
    """HTTP status, type and message; of our own mistakes, which are logged, a client learns only the request's id."""
    status, kind, message = told(error)
    if isinstance(error, UnknownModel):
        status, kind = 404, "NotFound"
    elif isinstance(error, RequestError):
        status = 400
    if status == 500:
        _log.error("request failed", request_id=request_id, exc_info=error)
        message = f"{message}: {request_id}"
    return status, kind, message


@dataclass(frozen=True, slots=True)
class InferCall:
    """A decoded call: its tensors, its parameters, and the names of the outputs it wants, all unless it names some."""

    inputs: Sequence[NamedTensor]
    parameters: Mapping[str, object] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    id: str = ""


@dataclass(frozen=True, slots=True)
class Inferred:
    """The answer to a call, with the outputs it wants in its order."""

    model: str
    version: str
    id: str
    outputs: Sequence[NamedTensor]


class OpenInference:
    """The protocol's verbs over the ranking that `using` gives while it lasts; `using` raises where there is none.

    Every verb that names a model raises UnknownModel for another one, and what `using` raises.
    """

    def __init__(self, using: Callable[[], AbstractContextManager[Ranking]]) -> None:
        self._using = using
        self._statistics = Statistics()
        # by ranking, and no longer than it is there: a version that is left must be let go of
        self._tensors: WeakKeyDictionary[Ranking, RankingTensors] = WeakKeyDictionary()

    def server(self) -> Plain:
        """The server's metadata."""
        return {"name": "prerank", "version": __version__, "extensions": list(EXTENSIONS)}

    def is_ready(self) -> bool:
        """Whether there is a version to rank with."""
        try:
            with self._using():
                return True
        except PrerankError:
            return False

    def is_model_ready(self, model: str, version: str = "") -> bool:
        """Whether this version, any if it is empty, is the one that ranks."""
        try:
            with self._found(model, version):
                return True
        except PrerankError:
            return False

    def metadata(self, model: str, version: str = "") -> Plain:
        """The model's versions, inputs and outputs."""
        with self._found(model, version) as ranking:
            tensors = self._described(ranking)
            return {
                "name": ranking.name,
                "versions": [ranking.version],
                "platform": PLATFORM,
                "inputs": [_metadata(one) for one in tensors.inputs],
                "outputs": [_metadata(one) for one in tensors.outputs],
            }

    def config(self, model: str, version: str = "") -> Plain:
        """The same as a model configuration, which says too what is optional; `tasks` are those of probs, in order."""
        with self._found(model, version) as ranking:
            tensors = self._described(ranking)
            said = {"tasks": ",".join(ranking.tasks), "max_k": str(ranking.max_k), "version": ranking.version}
            return {
                "name": ranking.name,
                "platform": PLATFORM,
                "backend": "prerank",
                "max_batch_size": MOST_USERS,
                "input": [{**_config(one), "optional": one.is_optional} for one in tensors.inputs],
                "output": [_config(one) for one in tensors.outputs],
                "parameters": {name: {"string_value": value} for name, value in said.items()},
            }

    def statistics(self, model: str = "", version: str = "") -> Plain:
        """Counts and times of the model, whichever there is if it has no name."""
        with self._found(model, version, may_be_any=True) as ranking:
            return {"model_stats": [self._statistics.of(ranking.name, ranking.version)]}

    def index(self) -> list[Plain]:
        """Every model that is ready."""
        try:
            with self._using() as ranking:
                return [{"name": ranking.name, "version": ranking.version, "state": "READY", "reason": ""}]
        except PrerankError:
            return []

    def infer(
        self,
        model: str,
        version: str,
        decode: Callable[[], InferCall],
        encode: Callable[[Inferred], T],
        arrived_ns: int,
    ) -> T:
        """Rank what `decode` gives, and `encode` the answer. `arrived_ns` is when it came, of `time.perf_counter_ns`.

        Raises RequestError naming what is wrong with the call, DeadlineExceeded where its `timeout` had passed before
        it could be ranked.
        """
        begun = time.perf_counter_ns()
        with self._found(model, version) as ranking, _stages(ranking.version, begun) as stages:
            try:
                call, tensors = decode(), self._described(ranking)
                wanted = _wanted(call.outputs, tensors.outputs)
                asked = tensors.read(call.inputs, time.time_ns() // 1_000_000)
                k = _k(call.parameters, asked, ranking.max_k)
                read, num = time.perf_counter_ns(), asked.item_ids.numel()
                stages.add("read_tensors", begun, read, len(call.inputs), num)
                _check_timeout(call.parameters, read - arrived_ns)
                ranked = ranking.rank(asked.item_ids, asked.askers, k, asked.values)
                done, kept = time.perf_counter_ns(), int(ranked.winners.valid.sum())
                stages.add("rank", read, done, num, kept)
                outputs = tensors.write(ranked)
                answer = Inferred(ranking.name, ranking.version, call.id, [outputs[name] for name in wanted])
                encoded = encode(answer)
            except BaseException:
                self._statistics.failed(ranking.version, time.perf_counter_ns() - arrived_ns)
                raise
            took = Took(begun - arrived_ns, read - begun, done - read, time.perf_counter_ns() - done)
            stages.add("write_tensors", done, done + took.compute_output, kept, kept)
            self._statistics.succeeded(ranking.version, len(asked.askers), took)
            return encoded

    @contextmanager
    def _found(self, model: str, version: str, may_be_any: bool = False) -> Iterator[Ranking]:
        with self._using() as ranking:
            if model != ranking.name and (model or not may_be_any):
                raise UnknownModel(f"model: expected {ranking.name!r}, the one there is, got {model[:200]!r}")
            if version not in ("", ranking.version):
                raise UnknownModel(f"version: expected {ranking.version!r}, the one that serves, got {version[:200]!r}")
            yield ranking

    def _described(self, ranking: Ranking) -> RankingTensors:
        found = self._tensors.get(ranking)
        if found is None:
            found = self._tensors[ranking] = RankingTensors(ranking)
        return found


class _Stages:
    """What was done of one call, as a request graph would tell it."""

    def __init__(self, begun_ns: int) -> None:
        self.begun_ns, self.reports = begun_ns, list[StageReport]()

    def add(self, name: str, start_ns: int, end_ns: int, num_in: int, num_out: int) -> None:
        """One that is done; times of `time.perf_counter_ns`."""
        start_ms, ms = (start_ns - self.begun_ns) / 1e6, (end_ns - start_ns) / 1e6
        self.reports.append(StageReport(name, ms, num_in, num_out, start_ms))


@contextmanager
def _stages(version: str, begun_ns: int) -> Iterator[_Stages]:
    """To be filled; what is seen of the request has them when this ends, also where it fails."""
    stages = _Stages(begun_ns)
    try:
        yield stages
    finally:
        if (seen := current()) is not None:
            seen.version = version
            seen.passed(begun_ns / 1e9, stages.reports, ())


def _metadata(spec: TensorSpec) -> Plain:
    return {"name": spec.name, "datatype": spec.datatypes[0], "shape": list(spec.shape)}


def _config(spec: TensorSpec) -> Plain:
    """As a model's configuration has it: without the first dimension, which is that of users."""
    datatype = spec.datatypes[0].replace("BYTES", "STRING")
    return {"name": spec.name, "data_type": f"TYPE_{datatype}", "dims": list(spec.shape[1:])}


def _wanted(names: Sequence[str], outputs: Sequence[TensorSpec]) -> list[str]:
    known = [one.name for one in outputs]
    for name in names:
        if name not in known:
            raise RequestError(f"outputs: expected some of {known}, got {name!r}{nearest(name, known)}")
    return list(names) or known


def _k(parameters: Mapping[str, object], asked: Candidates, max_k: int) -> int:
    """How many winners; unless it is said as many as there can be."""
    for name in parameters:
        if name not in _PARAMETERS:
            known = list(_PARAMETERS)
            raise RequestError(f"parameters.{name}: expected one of {known}{nearest(name, known)}")
    k = parameters.get("k", min(max_k, asked.item_ids.shape[1]))
    if type(k) is not int:
        raise RequestError(f"parameters.k: expected a whole number, got {k!r}")
    return k


def _check_timeout(parameters: Mapping[str, object], waited_ns: int) -> None:
    """Raises DeadlineExceeded where the call has waited longer than its `timeout`, which is in microseconds."""
    timeout = parameters.get("timeout", 0)  # 0 is none, as clients have it
    if type(timeout) is not int or timeout < 0:
        raise RequestError(f"parameters.timeout: expected microseconds, 0 or more, got {timeout!r}")
    if timeout and waited_ns > 1000 * timeout:
        raise DeadlineExceeded(f"the timeout of {timeout} microseconds passed before the call could be ranked")
