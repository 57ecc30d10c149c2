"""What OpenAPI says of bodies that are read by our own code."""

from typing import Any

__all__ = ["DIGEST", "ERROR", "INPUT_BODY", "TASK_BODY", "answers"]

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

DIGEST = "^[0-9a-f]{64}$"

INPUT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}

TASK_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": {"schema": _TASK}}}}

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
    429: "All servers are busy, or too many at once; see `Retry-After`.",
    503: "No server is alive, or the disk takes nothing; see `Retry-After`.",
}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route answers, by status."""
    return {
        status: {"description": _MEANING[status]} if status < 300 else {**ERROR, "description": _MEANING[status]}
        for status in statuses
    }
