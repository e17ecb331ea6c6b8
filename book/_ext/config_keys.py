"""The directive `config-keys`: the keys of one group of a config, from their schema."""

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from zo_tutorial.experiments.schema import Config

TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
SCHEMA = Config.model_json_schema()


class ConfigKeys(SphinxDirective):
    """A class of `zo_tutorial.experiments.schema`; without one, the groups of a config."""

    optional_arguments = 1

    def run(self):
        lines, group = [], SCHEMA
        if self.arguments:
            name = self.arguments[0]
            group = SCHEMA["$defs"][name]
            lines = [f"(config-{name.lower()})=", group.get("description", ""), ""]
        for key, field in group["properties"].items():
            if "const" in field:  # the group's name
                continue
            required = key in group.get("required", ()) or "default" not in field
            parts = [
                _kind(field),
                "no default" if required else f"default `{_written(field['default'])}`",
            ]
            meaning = field.get("description", "")
            lines += [f"`{key}`", f": {', '.join(parts)}{': ' * bool(meaning)}{meaning}", ""]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, source="schema"), 0, node)
        return node.children


def _kind(field: dict) -> str:
    """Type and range in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        written = SCHEMA["$defs"][name]["properties"].get("name", {}).get("const")
        return f"[{f'`{written}`' if written else 'a group'}](#config-{name.lower()})"
    for several in ("oneOf", "anyOf"):
        if several in field:
            return " or ".join(map(_kind, field[several]))
    if "enum" in field:
        return " or ".join(f"`{name}`" for name in field["enum"])
    if field.get("type") == "array":
        return "list of: " + " and ".join(
            map(_kind, field.get("prefixItems") or [field["items"]])
        )
    if field.get("type") == "object":
        return f"by name: {_kind(field['additionalProperties'])}"
    limits = " and ".join(
        f"{sign} {field[key]}" for key, sign in LIMITS.items() if key in field
    )
    return f"{TYPES[field['type']]} {limits}".strip()


def _written(value) -> str:
    """A default, as YAML has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def setup(app):
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True}
