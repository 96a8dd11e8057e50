"""The server's description of itself: OpenAPI from the wire structs, and the page that shows it."""

from __future__ import annotations

from collections.abc import Mapping

import jinja2
import msgspec

from prerank import __version__
from prerank.serve import arrow
from prerank.serve.traces import TraceBody, TracesBody
from prerank.serve.wire import (
    AnswerBody,
    ChangedBody,
    DescribedBody,
    ErrorBody,
    EventsBody,
    ItemsBody,
    MetadataBody,
    ReadyBody,
    RecommendBody,
    RecordedBody,
)
from prerank.types import Given

ERRORS = {
    400: "The body is not JSON.",
    413: "The body is too large.",
    422: "A field is wrong; the message names it, what it must be, and what came.",
    500: "The server's own mistake; its log has the request_id.",
    503: "No version is loaded, a store does not answer, the server ends, or too many wait. Try again later.",
    504: "The deadline passed before there was an answer.",
}


BODIES = (
    MetadataBody,
    DescribedBody,
    RecommendBody,
    AnswerBody,
    EventsBody,
    RecordedBody,
    ItemsBody,
    ChangedBody,
    ErrorBody,
    ReadyBody,
    TraceBody,
    TracesBody,
)


def openapi(
    example: Mapping[str, object], events: Mapping[str, object], items: Mapping[str, object]
) -> dict[str, object]:
    """The OpenAPI 3.1 document; `example`, `events` and `items` are bodies that work for this funnel."""
    _, schemas = msgspec.json.schema_components(BODIES, ref_template="#/components/schemas/{name}")
    recommend = _post("recommend", "The winners for one user.", "RecommendBody", example)
    record = _post("record", "What users did: the next request knows of it.", "EventsBody", events)
    ids = {"item_ids": [one["item_id"] for one in items.get("items", [])]}  # type: ignore[attr-defined]
    describe = _post("describe", "Metadata of items, deferred columns too.", "MetadataBody", ids)
    change = _post("change", "Items: on or off, pacing, bids; those that come, change and leave.", "ItemsBody", items)
    change["requestBody"]["content"][arrow.CONTENT_TYPE] = {  # type: ignore[index]
        "schema": {"type": "string", "format": "binary", "description": f"The same as columns: {arrow.COLUMNS}."}
    }
    errors = {str(status): _answer(why, _json("ErrorBody")) for status, why in ERRORS.items()}
    recommend["responses"] = {"200": _answer("Winners, best first.", _json("AnswerBody")), **errors}
    del errors["504"]
    describe["responses"] = {"200": _answer("One an item_id.", _json("DescribedBody")), **errors}
    errors |= _GUARDED
    record["responses"] = {"200": _answer("All of it is on the disk.", _json("RecordedBody")), **errors}
    full = {"507": _answer("More items come than the version has free rows.", _json("ErrorBody"))}
    change["responses"] = {"200": _answer("All of it is on the disk.", _json("ChangedBody")), **errors, **full}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "prerank",
            "version": __version__,
            "description": "The early half of an ads or recommendation funnel: a request in, winners out.",
        },
        "paths": {
            "/v1/recommend": {"post": recommend},
            "/v1/metadata": {"post": describe},
            "/v1/events": {"post": record},
            "/v1/items": {"post": change},
            "/v1/traces": {
                "get": _get("The latest requests.", {"200": _answer("Latest first.", _json("TracesBody")), **_GUARDED})
            },
            "/v1/trace/{id}": {"get": _trace()},
            "/healthz": {"get": _get("Is the process alive?", {"200": _answer("It is.", _text())})},
            "/readyz": {
                "get": _get(
                    "Is a version loaded, with its golden answers reproduced, and do enough index shards answer?",
                    {"200": _answer("Yes.", _json("ReadyBody")), "503": _answer("No, and why.", _json("ErrorBody"))},
                )
            },
            "/metrics": {"get": _get("Prometheus metrics.", {"200": _answer("Counters and histograms.", _text())})},
        },
        "components": {"schemas": schemas},
    }


def docs_page(
    example: Mapping[str, object],
    events: Mapping[str, object],
    items: Mapping[str, object],
    version: str,
    context: Mapping[str, Given],
) -> str:
    """The page at /docs, whole in itself: endpoints, schemas, examples for this funnel and a form to try it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prerank.serve", "pages"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    document = openapi(example, events, items)
    return environment.get_template("docs.html").render(
        paths=document["paths"],
        schemas={name: _fields(schema) for name, schema in _schemas(document).items()},
        example=msgspec.json.format(msgspec.json.encode(example), indent=2).decode(),
        events=msgspec.json.encode(events).decode(),
        items=msgspec.json.encode(items).decode(),
        version=version,
        context=context,
        package_version=__version__,
    )


def _schemas(document: Mapping[str, object]) -> Mapping[str, Mapping[str, object]]:
    components = document["components"]
    assert isinstance(components, dict)
    return dict(components["schemas"])


def _fields(schema: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Each property of a schema as name, type and description, for people."""
    properties = schema["properties"]
    assert isinstance(properties, dict)
    return [(name, _type(one), _about(one)) for name, one in properties.items()]


def _type(schema: Mapping[str, object]) -> str:
    match schema:
        case {"$ref": str(ref)}:
            return ref.rpartition("/")[2]
        case {"anyOf": list(options)}:
            return " | ".join(_type(option) for option in options)
        case {"type": "array", "items": dict(items)}:
            return f"[{_type(items)}]"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"{{name: {_type(values)}}}"
        case _:
            return str(schema["type"])


def _about(schema: Mapping[str, object]) -> str:
    options = schema.get("anyOf", [])
    assert isinstance(options, list)
    told = [str(one["description"]) for one in (schema, *options) if "description" in one]
    return told[0] if told else ""


def _ref(name: str) -> dict[str, object]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


def _json(name: str) -> dict[str, object]:
    return {"application/json": _ref(name)}


def _text() -> dict[str, object]:
    return {"text/plain": {"schema": {"type": "string"}}}


def _answer(description: str, content: Mapping[str, object]) -> dict[str, object]:
    return {"description": description, "content": content}


def _post(operation: str, summary: str, body: str, example: Mapping[str, object]) -> dict[str, object]:
    return {
        "summary": summary,
        "operationId": operation,
        "parameters": [
            {
                "name": "x-request-id",
                "in": "header",
                "description": "Comes back with the answer and stands in the logs; made up if absent.",
                "schema": {"type": "string", "maxLength": 128},
            }
        ],
        "requestBody": {"required": True, "content": {"application/json": {**_ref(body), "example": example}}},
    }


def _trace() -> dict[str, object]:
    answers = {
        "200": _answer("Its stages, times and counts.", _json("TraceBody")),
        "404": _answer("It is not kept, or no longer.", _json("ErrorBody")),
        **_GUARDED,
    }
    about = {"name": "id", "in": "path", "required": True, "description": "Its x-request-id."}
    return {**_get("One recent request.", answers), "parameters": [{**about, "schema": {"type": "string"}}]}


def _get(summary: str, responses: Mapping[str, object]) -> dict[str, object]:
    return {"summary": summary, "responses": responses}


_GUARDED = {
    "401": _answer("The server needs an admin token: authorization: Bearer ...", _json("ErrorBody")),
    "403": _answer("It has none, and a browser's page of another site asks.", _json("ErrorBody")),
}
