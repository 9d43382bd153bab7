"""A checker of JSON documents against the part of JSON Schema that ours uses; anything else in a schema is an error."""

import re

_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
_KNOWN = set(
    "$schema $defs $ref title description type properties required additionalProperties items minItems enum const "
    "minimum maximum pattern".split()
)


def faults(document, schema, root=None, where="$"):
    """What of a document is not as its schema says, a line each; properties that it does not describe count too."""
    root = root or schema
    assert schema.keys() <= _KNOWN, schema.keys() - _KNOWN
    if reference := schema.get("$ref"):
        return faults(document, root["$defs"][reference.removeprefix("#/$defs/")], root, where)
    kinds = schema.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_is(document, kind) for kind in kinds):
        return [f"{where}: {document!r}, expected {kinds}"]
    found = []
    if ("enum" in schema and document not in schema["enum"]) or ("const" in schema and document != schema["const"]):
        found.append(f"{where}: {document!r}")
    if isinstance(document, str) and not re.search(schema.get("pattern", ""), document):
        found.append(f"{where}: {document!r}, expected {schema['pattern']}")
    if _is(document, "number") and not schema.get("minimum", document) <= document <= schema.get("maximum", document):
        found.append(f"{where}: {document} is out of range")
    if isinstance(document, list):
        found += [f"{where}: too few"] if len(document) < schema.get("minItems", 0) else []
        for place, each in enumerate(document):
            found += faults(each, schema.get("items", {}), root, f"{where}[{place}]")
    if isinstance(document, dict):
        described, others = schema.get("properties", {}), schema.get("additionalProperties", "properties" not in schema)
        found += [f"{where}: lacks {name}" for name in schema.get("required", []) if name not in document]
        found += [f"{where}: {name} is not described" for name in document if name not in described and not others]
        for name, value in document.items():
            inner = described.get(name, others if isinstance(others, dict) else {})
            found += faults(value, inner, root, f"{where}.{name}")
    return found


def _is(document, kind):
    if isinstance(document, bool):
        return kind == "boolean"
    return isinstance(document, _TYPES[kind])
