"""What OpenAPI says of bodies that are read, and answers that are made, by our own code."""

from typing import Annotated, Any

from fastapi import Path, Query

from gmel.edge.task import STATES

__all__ = [
    "BEAT_BODY",
    "BRING_BODY",
    "ERROR",
    "FETCH_BODY",
    "HEAR_BODY",
    "INPUT_BODY",
    "POLICY_BODY",
    "TASK_BODY",
    "Digest",
    "Name",
    "Patience",
    "answers",
    "gives",
]

_NAME = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$"}

_TASK: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["id", "device", "model"],
    "properties": {
        "id": {**_NAME, "description": "Chosen by the client: the same id is the same task however often it is sent."},
        "device": {**_NAME, "description": "Who asks."},
        "model": {**_NAME, "description": "Name of the generator."},
        "label": {"type": "string", "maxLength": 64, "description": "Class to draw; empty: the first one."},
        "images": {"type": "integer", "minimum": 1, "maximum": 256, "default": 1},
        "steps": {"type": ["integer", "null"], "minimum": 1, "maximum": 1000, "description": "Denoising steps."},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "default": 0},
        "deadline_s": {"type": "number", "minimum": 1e-3, "maximum": 1e7, "default": 60.0},
        "expire": {"type": "boolean", "default": False, "description": "Worth nothing after the deadline."},
        "size_bit": {"type": "number", "minimum": 0, "maximum": 1e13, "default": 0},
        "links_bps": {
            "type": "object",
            "maxProperties": 256,
            "propertyNames": _NAME,
            "additionalProperties": {"type": "number", "minimum": 1, "maximum": 1e13},
            "description": "What the device estimates of its link to servers by name.",
        },
        "input": {
            "type": "string",
            "pattern": "^([0-9a-f]{64})?$",
            "description": "SHA-256 of a photo that was uploaded before, to draw on; empty: none.",
        },
    },
}

_DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_TIME = {"type": "number", "minimum": -1e9, "maximum": 1e9}

_BEAT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "url": {
            "type": ["string", "null"],
            "pattern": r"^https?://[A-Za-z0-9.-]*[A-Za-z0-9](:[1-9][0-9]{0,3})?$",
            "maxLength": 200,
            "description": "Where it takes tasks; null: it fetches them.",
        },
        "speed": {"type": "number", "minimum": 1e-6, "maximum": 1e9, "description": "Work units per second."},
        "gpus": {"type": "integer", "minimum": 1, "maximum": 64, "default": 1},
        "memory_gb": {"type": "number", "minimum": 0, "maximum": 1e6, "default": 1},
        "resident": {"type": "array", "maxItems": 1024, "items": _NAME, "description": "Models in memory."},
        "models": {"type": ["array", "null"], "maxItems": 1024, "items": _NAME, "description": "null: all."},
        "foreign_s": {"type": "number", "minimum": 0, "maximum": 1e9, "description": "Work from elsewhere."},
        "draining": {"type": "boolean", "default": False},
        "running": {"type": "integer", "minimum": 0, "maximum": 1_000_000, "default": 0},
        "together": {"type": "integer", "minimum": 1, "maximum": 256, "default": 1, "description": "Photos in one go."},
    },
}

_FETCH: dict[str, Any] = {
    "type": "object",
    "properties": {
        "room": {"type": "integer", "minimum": 0, "maximum": 1000, "default": 1},
        "wait_s": {"type": "number", "minimum": 0, "maximum": 60, "default": 20},
        "mark": {"type": "string", "maxLength": 64, "default": "", "description": "Of the process that fetches."},
    },
}

_HEAR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "event": {"description": "queued, loading, running, progress, beat; what is none of them counts as a beat."},
        "share": {"description": "From 0 to 1: how much is done; anything else is passed over."},
    },
}

_BRING: dict[str, Any] = {
    "type": "object",
    "required": ["event"],
    "properties": {
        "event": {"enum": ["done", "failed", "gone"]},
        "data": {"type": "string", "pattern": "^([A-Za-z0-9+/]{4})*$", "description": "The result in base64."},
        "kind": {"description": "Its media type; what is none is passed over."},
        "error": {"description": "Why it failed."},
        "wait_s": _TIME,
        "switch_s": _TIME,
        "service_s": _TIME,
        "together": {"type": "integer", "minimum": 0, "maximum": 2**20, "description": "Photos that the work made."},
    },
}

_POLICY: dict[str, Any] = {
    "type": "object",
    "anyOf": [
        {
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "description": "A rule or a policy."},
                "shadow": {"type": "boolean", "default": False},
            },
        },
        {
            "required": ["shadow"],
            "properties": {"name": {"type": "null", "description": "Nobody."}, "shadow": {"const": True}},
        },
    ],
}


def _body(schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


# What these say is checked by our own code, so that it is refused in our own words.
Name = Annotated[str, Path(json_schema_extra=_NAME)]
"""A name in a path."""
Digest = Annotated[str, Path(json_schema_extra=_DIGEST)]
"""A SHA-256 in a path."""
Patience = Annotated[float, Query(json_schema_extra={"minimum": 0, "maximum": 60})]
"""Seconds to wait for something."""

BEAT_BODY, FETCH_BODY, HEAR_BODY, BRING_BODY = _body(_BEAT), _body(_FETCH), _body(_HEAR), _body(_BRING)
POLICY_BODY, TASK_BODY = _body(_POLICY), _body(_TASK)
INPUT_BODY = _body({"type": "string", "format": "binary"}, "application/octet-stream")

ERROR: dict[str, Any] = {
    "description": "Why not.",
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
        }
    },
}

_MEANING = {
    200: "As asked.",
    202: "Accepted: it is on disk.",
    404: "Not here.",
    201: "It is here now.",
    408: "The body did not come to an end.",
    409: "The id is that of another task, or the task has ended without a result.",
    410: "The result is no longer in the store.",
    413: "The body is too long.",
    422: "A parameter that is no number.",
    429: "All servers are busy, or too many at once; see `Retry-After`.",
    503: "No server is alive, or the disk takes nothing; see `Retry-After`.",
}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route answers, by status."""
    return {
        status: {"description": _MEANING[status]} if status < 300 else {**ERROR, "description": _MEANING[status]}
        for status in statuses
    }


_TEXT, _COUNT, _NUMBER = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "number"}
_MAYBE_TEXT, _MAYBE_NUMBER = {"type": ["string", "null"]}, {"type": ["number", "null"]}
_MAYBE_OBJECT: dict[str, Any] = {"type": ["object", "null"]}
_FLAG = {"type": "boolean"}
_STATE = {"enum": list(STATES)}


def _fields(**fields: Any) -> dict[str, Any]:
    """An object that has all of these fields, and may have others."""
    return {"type": "object", "required": list(fields), "properties": fields}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


_ENTRY = _fields(
    id=_NAME,
    state=_STATE,
    attempt=_COUNT,
    server=_MAYBE_TEXT,
    accepted_s=_NUMBER,
    finished_s=_MAYBE_NUMBER,
    result={"type": ["string", "null"], "pattern": _DIGEST["pattern"]},
    result_bytes={"type": ["integer", "null"]},
    error=_MAYBE_TEXT,
    request=_TASK,
    record=_MAYBE_OBJECT,
    sequence=_COUNT,
)
_SERVER = _fields(
    name=_NAME,
    alive=_FLAG,
    usable=_FLAG,
    draining=_FLAG,
    heard_s=_MAYBE_NUMBER,
    mode={"enum": ["push", "pull", None]},
    speed=_NUMBER,
    gpus=_COUNT,
    pace=_NUMBER,
    backlog_s={"type": "number", "minimum": 0},
    tasks=_COUNT,
    waiting=_COUNT,
    resident=_list(_NAME),
    models={"type": ["array", "null"], "items": _NAME},
    done=_COUNT,
    lost=_COUNT,
)
_POLICIES = _fields(
    current=_fields(version=_COUNT, name=_TEXT, since_s=_NUMBER),
    history=_list(_fields(version=_COUNT, name=_TEXT, since_s=_NUMBER)),
    shadow=_MAYBE_OBJECT,
    known=_list(_TEXT),
    fallbacks=_COUNT,
    reasons=_list(_TEXT),
)
_GIVEN: dict[str, dict[str, Any]] = {
    "task": _ENTRY,
    "accepted": _fields(id=_NAME, state=_STATE, new=_FLAG),
    "tasks": _fields(tasks=_list(_ENTRY), next={"type": ["integer", "null"]}),
    "input": _fields(input=_DIGEST, new=_FLAG),
    "beat": _fields(name=_NAME, tasks=_COUNT),
    "servers": _fields(servers=_list(_SERVER)),
    "plant": _fields(name=_TEXT, servers={"type": "object"}, models={"type": "object"}),
    "fetched": _fields(
        tasks=_list(_fields(task=_TASK, attempt=_COUNT)),
        cancelled=_list(_NAME),
    ),
    "wanted": _fields(wanted=_FLAG),
    "policy": _POLICIES,
    "state": _fields(
        gmel=_TEXT,
        plant=_TEXT,
        open=_COUNT,
        parked=_COUNT,
        counts={"type": "object"},
        policy=_POLICIES,
        servers=_list(_SERVER),
    ),
    "healthy": _fields(status=_TEXT),
    "ready": {"anyOf": [_fields(ready=_FLAG, servers=_COUNT), _fields(error=_TEXT)]},
}


def gives(what: str, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers with a body of ours, by status.

    Args:
        what: which body.
        statuses: 200 if left out.
    """
    content = {"application/json": {"schema": _GIVEN[what]}}
    return {status: {"description": _MEANING[status], "content": content} for status in statuses or (200,)}
