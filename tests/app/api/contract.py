"""Answers against the service's own description of them, /openapi.json."""

from typing import Any

Json = Any
_KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def violations(value: Json, schema: dict[str, Any], document: dict[str, Any], where: str = "") -> list[str]:
    """What of a value its schema doesn't say or forbids; members that it doesn't name are found, too.

    Args:
        value: Of an answer.
        schema: JSON Schema, of the keywords that FastAPI writes.
        document: What references point into.
        where: The value is.
    """
    if "$ref" in schema:
        target: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return violations(value, target, document, where)
    if "anyOf" in schema:
        tries = [violations(value, one, document, where) for one in schema["anyOf"]]
        return [] if [] in tries else [f"{where}: fits none of {len(tries)}: {min(tries, key=len)}"]
    if "const" in schema and value != schema["const"]:
        return [f"{where}: {value!r} is not {schema['const']!r}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value!r} is none of {schema['enum']}"]
    return _of_kind(value, schema, document, where) if "type" in schema else []


def _of_kind(value: Json, schema: dict[str, Any], document: dict[str, Any], where: str) -> list[str]:
    kind = schema["type"]
    fits = isinstance(value, _KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))
    if not fits:
        return [f"{where}: {value!r:.60} is no {kind}"]
    if kind == "array":
        return [
            found
            for index, item in enumerate(value)
            for found in violations(item, schema.get("items", {}), document, f"{where}/{index}")
        ]
    return _of_object(value, schema, document, where) if kind == "object" else []


def _of_object(
    value: dict[str, Json], schema: dict[str, Any], document: dict[str, Any], where: str
) -> list[str]:
    named = schema.get("properties", {})
    found = [f"{where}/{name}: is missing" for name in schema.get("required", []) if name not in value]
    for name, member in value.items():
        if name in named:
            found += violations(member, named[name], document, f"{where}/{name}")
        elif isinstance(others := schema.get("additionalProperties"), dict):
            found += violations(member, others, document, f"{where}/{name}")
        elif named and others is not True:
            found.append(f"{where}/{name}: is not described")
    return found
