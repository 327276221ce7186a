"""A file of settings in YAML: read whole or refused in one line. Knows no setting.

What is read is what is written: no key twice, no aliases. A few lines of aliases of aliases stand for more values than
any memory holds, and a list can hold itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from blockpruner.errors import ConfigurationError
from flows.wording import size

_MOST_BYTES = 2**20
"""Far more than settings take; a model or a text that is given by mistake is not read for minutes."""


class _Loader(yaml.SafeLoader):
    """YAML without the silent choice of the last of two equal keys, and without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """See SafeLoader."""
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {alias.start_mark.line + 1} repeats the value *{alias.anchor}; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See SafeLoader."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise yaml.YAMLError(f"{key.value!r} is given in line {lines[key.value]} and in line {line}; keep one")
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """See SafeLoader; no number that Python would not show (hexadecimal ones have no limit of their own)."""
        number = super().construct_yaml_int(node)
        str(number)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings that a YAML file holds, unchecked.

    Raises:
        ConfigurationError: if it cannot be read, or holds no mapping.
    """
    try:
        if (num_bytes := path.stat().st_size) > _MOST_BYTES:
            raise ConfigurationError(f"recipe {path} cannot be read: {size(num_bytes)} are no settings; give a recipe")
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigurationError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    except (LookupError, AttributeError) as error:  # what PyYAML makes of a tag such as !!int on what is none
        raise ConfigurationError(
            f"recipe {path} cannot be read: a tag (!!) does not fit its value; leave tags out"
        ) from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"recipe {path} holds no settings; write lines such as `model: DIR`")
    return {str(key): value for key, value in values.items()}
