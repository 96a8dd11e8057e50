"""The JSON a client sends and gets, as strict structs: unknown fields, wrong types, NaN and Infinity are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from prerank._toml import nearest
from prerank.errors import RequestError
from prerank.serve.answer import INT64, LAST_TIME_MS, MOST_EXCLUDED, Answer, Winner
from prerank.serve.changes import MOST_CHANGES, Changed
from prerank.serve.metadata import MOST_ITEMS, Described
from prerank.serve.record import LONGEST_EVENT_ID, MOST_EVENTS, Recorded
from prerank.stores.events import LiveEvent
from prerank.types import ItemChange, Request

# ranges are told here and checked in `answer.check_request`, where the command line passes too
_Int64: TypeAlias = Annotated[int, Meta(extra_json_schema={"minimum": INT64.start, "maximum": INT64.stop - 1})]
_Moment: TypeAlias = Annotated[int, Meta(extra_json_schema={"minimum": 0, "maximum": LAST_TIME_MS})]
_Positive: TypeAlias = Annotated[float, Meta(extra_json_schema={"exclusiveMinimum": 0})]
_NotNegative: TypeAlias = Annotated[float, Meta(extra_json_schema={"minimum": 0})]
_Plain: TypeAlias = str | int | float | bool | None
_ContextValue: TypeAlias = _Plain | list[_Plain]


class MalformedBody(RequestError):
    """The body is not JSON at all."""


class RecommendBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v1/recommend` takes."""

    user_id: Annotated[_Int64, Meta(description="Whose winners. An id the store does not know is a new user.")]
    k: Annotated[int, Meta(description="How many winners, at least 1.", extra_json_schema={"minimum": 1})]
    context: Annotated[dict[str, _ContextValue], Meta(description="One value a context feature of the funnel.")] = {}
    exclude: Annotated[
        list[_Int64],
        Meta(
            description="Item_ids that must not win: blocked by the user, or shown as often as a cap lets.",
            extra_json_schema={"maxItems": MOST_EXCLUDED},
        ),
    ] = []
    metadata: (
        Annotated[list[str], Meta(description="The columns wanted of each winner; null is all that come with answers.")]
        | None
    ) = None
    deadline_ms: (
        Annotated[_Positive, Meta(description="Milliseconds from arrival; null is the funnel's default.")] | None
    ) = None
    time_ms: Annotated[_Moment, Meta(description="The moment asked about, UTC milliseconds; null is now.")] | None = (
        None
    )

    def request(self, *, now_ms: int, deadline_ms: float, request_id: str) -> Request:
        """As the funnel's noun, with what the body left out filled in."""
        return Request(
            user_id=self.user_id,
            k=self.k,
            time_ms=now_ms if self.time_ms is None else self.time_ms,
            context=self.context,
            deadline_ms=deadline_ms if self.deadline_ms is None else self.deadline_ms,
            request_id=request_id,
            exclude=tuple(self.exclude),
            metadata=None if self.metadata is None else tuple(self.metadata),
        )


class _Hurry(msgspec.Struct):
    """What of a request is asked before its turn comes."""

    deadline_ms: float | None = None


class EventBody(msgspec.Struct, forbid_unknown_fields=True):
    """One thing a user did."""

    user_id: Annotated[_Int64, Meta(description="Who. An id the store does not know has a history from now on.")]
    item_id: Annotated[_Int64, Meta(description="With what. An item this version does not have is kept for the next.")]
    event: Annotated[str, Meta(description='"impression", or a label of the funnel that came after one.')]
    time_ms: Annotated[_Moment, Meta(description="When, UTC milliseconds; null is now.")] | None = None
    event_id: Annotated[
        str,
        Meta(
            description="A second event of the user with this id is the first one sent again; empty is none.",
            extra_json_schema={"maxLength": LONGEST_EVENT_ID},
        ),
    ] = ""
    context: Annotated[
        dict[str, _ContextValue],
        Meta(description="Of the request that the item was shown for, a label's too: counters `on` a field read it."),
    ] = {}

    def event_at(self, now_ms: int) -> LiveEvent:
        """As the store's noun, with what the body left out filled in."""
        time_ms = now_ms if self.time_ms is None else self.time_ms
        return LiveEvent(self.user_id, self.item_id, self.event, time_ms, self.event_id, self.context)


class EventsBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v1/events` takes: all of it or nothing."""

    events: Annotated[list[EventBody], Meta(extra_json_schema={"minItems": 1, "maxItems": MOST_EVENTS})]

    def live(self, now_ms: int) -> list[LiveEvent]:
        """Every event, as the store's noun."""
        return [one.event_at(now_ms) for one in self.events]


class RecordedBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v1/events` gives: every event of the call is on the disk, and the next request knows of it."""

    accepted: Annotated[int, Meta(description="All of the call.")]
    unknown_items: Annotated[int, Meta(description="Of those, with items that this version does not have.")]
    repeated: Annotated[int, Meta(description="Of those, sent before by their event_id, and not counted again.")]
    already_logged: Annotated[int, Meta(description="Of those, from when the log is right: not counted again.")]


class ItemBody(msgspec.Struct, forbid_unknown_fields=True):
    """A change of one item; what is null or left out stays as it is."""

    item_id: Annotated[_Int64, Meta(description="Which. One that this version does not have is kept for the next.")]
    on: Annotated[bool, Meta(description="Whether it may win at all.")] | None = None
    pacing: Annotated[_NotNegative, Meta(description="What its utility is multiplied by.")] | None = None
    values: Annotated[dict[str, float], Meta(description="New numbers of what the utility reads, such as bids.")] = {}
    columns: (
        Annotated[
            dict[str, _ContextValue],
            Meta(description="The whole item anew, by the names of the items table; null where a value is not known."),
        ]
        | None
    ) = None
    removed: Annotated[bool, Meta(description="Whether it is taken out; then there is nothing beside it.")] = False


class ItemsBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v1/items` takes: all of it or nothing."""

    items: Annotated[list[ItemBody], Meta(extra_json_schema={"minItems": 1, "maxItems": MOST_CHANGES})]

    def changes(self) -> list[ItemChange]:
        """Every change, as the noun."""
        return [ItemChange(one.item_id, one.on, one.pacing, one.values, one.columns, one.removed) for one in self.items]


class ChangedBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v1/items` gives: every change is on the disk, and requests that begin now know of it."""

    accepted: Annotated[int, Meta(description="All of the call.")]
    unknown_items: Annotated[int, Meta(description="Of those, of items that this version does not have.")]
    free_rows: Annotated[int, Meta(description="For how many items that come, or are written anew, there is room yet.")]


class MetadataBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v1/metadata` takes."""

    item_ids: Annotated[list[_Int64], Meta(extra_json_schema={"minItems": 1, "maxItems": MOST_ITEMS})]
    columns: Annotated[list[str], Meta(description="Deferred ones too; null is all that are kept.")] | None = None


class DescribedBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v1/metadata` gives."""

    version: str
    items: Annotated[
        list[dict[str, _ContextValue] | None], Meta(description="One an item_id; null for an item that is not here.")
    ]


class _SplitBody(msgspec.Struct, forbid_unknown_fields=True):
    """An EventsBody whose events are looked at one by one, to say which of them is wrong."""

    events: list[msgspec.Raw]


class _SplitItems(msgspec.Struct, forbid_unknown_fields=True):
    """The same of an ItemsBody."""

    items: list[msgspec.Raw]


class StageBody(msgspec.Struct, forbid_unknown_fields=True, rename={"num_in": "in", "num_out": "out"}):
    """One stage that ran: when it began and its wall time, in ms, and how many things went in and came out."""

    name: str
    start_ms: float
    ms: float
    num_in: int
    num_out: int


class AnswerBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v1/recommend` gives: winners, best first, all of one version."""

    request_id: str
    version: str
    winners: Sequence[Winner]
    stages: list[StageBody]
    degraded: Annotated[bool, Meta(description="True if a stage was replaced by its fallback; notes say why.")]
    notes: Sequence[str]


class ErrorDetail(msgspec.Struct):
    """What went wrong, in words meant for the caller."""

    type: str
    message: str
    request_id: str


class ErrorBody(msgspec.Struct):
    """Every answer that is not a success."""

    error: ErrorDetail


class ReadyBody(msgspec.Struct):
    """A version is loaded and gave its golden answers, and of its index enough shards answer."""

    status: str
    version: str
    shards: Annotated[int, Meta(description="Of the index, where it is on hosts of its own.")] | None = None
    missing_shards: Annotated[list[int], Meta(description="Those of which no host answers, by number.")] = []


_request = msgspec.json.Decoder(RecommendBody)
_metadata = msgspec.json.Decoder(MetadataBody)
_hurry = msgspec.json.Decoder(_Hurry)
_events = msgspec.json.Decoder(EventsBody)
_items = msgspec.json.Decoder(ItemsBody)
_split = msgspec.json.Decoder(_SplitBody)
_split_items = msgspec.json.Decoder(_SplitItems)
_one_item = msgspec.json.Decoder(ItemBody)
_one_event = msgspec.json.Decoder(EventBody)
_WHAT: dict[type[msgspec.Struct], str] = {
    RecommendBody: "request",
    MetadataBody: "call",
    _SplitBody: "call",
    _SplitItems: "call",
    EventBody: "event",
    ItemBody: "item",
}
_MISTYPED = re.compile(r"^Expected (?P<expected>.+), got (?P<came>.+?)(?: - at `\$\.?(?P<path>.*)`)?$")
_OUT_OF_RANGE = re.compile(r"^Number out of range - at `\$\.?(?P<path>.*)`$")


def decode_request(content: bytes) -> RecommendBody:
    """The body as sent. Raises MalformedBody if it is no JSON, RequestError naming the field that is wrong."""
    with _malformed():
        try:
            return _request.decode(content)
        except msgspec.ValidationError as error:
            raise RequestError(_sentence(str(error), RecommendBody, content)) from None


def decode_metadata(content: bytes) -> MetadataBody:
    """The same of a call for metadata."""
    with _malformed():
        try:
            return _metadata.decode(content)
        except msgspec.ValidationError as error:
            raise RequestError(_sentence(str(error), MetadataBody, content)) from None


def encode_described(described: Described) -> bytes:
    """Metadata as JSON, in the form of `DescribedBody`."""
    return msgspec.json.encode(described)


def deadline_ms_of(content: bytes) -> float | None:
    """The deadline alone, for a body that is not decoded yet; None where it names none that can be one."""
    try:
        found = _hurry.decode(content).deadline_ms
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None  # what is wrong with it is said when it is decoded
    return found if found is not None and found > 0 else None


def decode_events(content: bytes) -> EventsBody:
    """The same of events; the field is said with the place of its event."""
    with _malformed():
        try:
            return _events.decode(content)
        except msgspec.ValidationError:
            _refuse_event(content)
            raise


def decode_items(content: bytes) -> ItemsBody:
    """The same of changes of items."""
    with _malformed():
        try:
            return _items.decode(content)
        except msgspec.ValidationError:
            _refuse_item(content)
            raise


def _refuse_event(content: bytes) -> None:
    _refuse_one(content, "events", lambda: _split.decode(content).events, _SplitBody, _one_event.decode, EventBody)


def _refuse_item(content: bytes) -> None:
    _refuse_one(content, "items", lambda: _split_items.decode(content).items, _SplitItems, _one_item.decode, ItemBody)


def _refuse_one(
    content: bytes,
    name: str,
    split: Callable[[], list[msgspec.Raw]],
    whole: type[msgspec.Struct],
    decode: Callable[[msgspec.Raw], object],
    body: type[msgspec.Struct],
) -> None:
    """Raises RequestError naming the first of a list that is wrong, and its field."""
    try:
        parts = split()
    except msgspec.ValidationError as error:
        raise RequestError(_sentence(str(error), whole, content)) from None
    except RecursionError:
        raise RequestError(f"{name}: expected objects of plain values, got one that nests too deep") from None
    for place, one in enumerate(parts):
        try:
            decode(one)
        except msgspec.ValidationError as error:
            told = _sentence(str(error), body, bytes(one))
            raise RequestError(f"{name}[{place}]{told[4:] if told.startswith('body: ') else '.' + told}") from None


@contextmanager
def _malformed() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise MalformedBody(f"body: expected JSON in UTF-8: {error.reason} (byte {error.start})") from None
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as error:
        raise MalformedBody(f"body: expected one JSON object: {error}") from None


def encode_answer(answer: Answer) -> bytes:
    """The answer as JSON, in the form of `AnswerBody`."""
    stages = [StageBody(s.name, round(s.start_ms, 3), round(s.ms, 3), s.num_in, s.num_out) for s in answer.stages]
    body = AnswerBody(answer.request_id, answer.version, answer.winners, stages, answer.degraded, answer.notes)
    return msgspec.json.encode(body)


def encode_recorded(recorded: Recorded) -> bytes:
    """What came of events as JSON, in the form of `RecordedBody`."""
    return msgspec.json.encode(recorded)


def encode_changed(changed: Changed) -> bytes:
    """What came of changes as JSON, in the form of `ChangedBody`."""
    return msgspec.json.encode(changed)


def encode_error(kind: str, message: str, request_id: str) -> bytes:
    """The one form of an error."""
    return msgspec.json.encode(ErrorBody(ErrorDetail(kind, message, request_id)))


def _sentence(told: str, body: type[msgspec.Struct], content: bytes) -> str:
    """msgspec's message as field, expected, came."""
    if found := re.search("unknown field `(.*)`", told):
        fields = [f.name for f in msgspec.structs.fields(body)]
        return f"{found[1]}: unknown field, expected one of {fields}{nearest(found[1], fields)}"
    if found := re.search("missing required field `(.*)`", told):
        return f"{found[1]}: missing, and every {_WHAT[body]} needs it"
    if found := _OUT_OF_RANGE.match(told):
        return f"{_field(found['path'], content)}: expected a number a 64-bit float can hold"
    if found := _MISTYPED.match(told):
        field = _field(found["path"] or "", content)
        return f"{field}: expected {found['expected']}, got {found['came']}".replace("`", "")
    return told


def _field(path: str, content: bytes) -> str:
    # msgspec does not say which key of a mapping it means, so the one that nests too deep is looked up
    if path.startswith("context[...]"):
        try:
            context = msgspec.json.decode(content)["context"]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return "context"
        return next((f"context.{name}" for name, value in context.items() if _nests(value)), "context")
    return path or "body"


def _nests(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value))
