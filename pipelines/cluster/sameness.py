"""Whether a job that is there is the one that is to be submitted, whoever made it.

What `danceopd job submit` makes carries a hash of what was submitted. What kubectl applied carries the text that was
applied. Anything else is compared with what the server made of it, which only adds defaults.
"""

from __future__ import annotations

import json
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from danceopd.files import content_key

SPEC = "danceopd/spec"  # annotation: what was submitted, as a hash
APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
AMOUNTS = ("requests", "limits", "sizeLimit")  # quantities: "1000m" is "1"


def same_spec(there: dict, spec: dict) -> bool:
    """Whether an object on the cluster was made from this specification."""
    annotations = there["metadata"].get("annotations") or {}
    if SPEC in annotations:
        return annotations[SPEC] == content_key(spec)
    if APPLIED in annotations:
        return json.loads(annotations[APPLIED]).get("spec") == spec
    return _holds(there.get("spec"), spec)


def _holds(whole: Any, part: Any, amount: bool = False) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            key in whole and _holds(whole[key], value, amount or key in AMOUNTS) for key, value in part.items()
        )
    if isinstance(part, list):
        return isinstance(whole, list) and len(whole) == len(part) and all(map(_holds, whole, part))
    return parse_quantity(whole) == parse_quantity(part) if amount else whole == part
