"""`--set FIELD=VALUE`, and numbers as people write them."""

import json
from collections.abc import Mapping
from typing import Any

OWN_OPTIONS = {"output_dir": "--checkpoints DIR", "resume_from_checkpoint": "--resume", "disable_tqdm": "--quiet"}
"""Field -> the option that is there for it, and which alone the command looks at."""


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Return {"hysteresis": 0.1} for ["hysteresis=0.1"]; values are read as JSON, or else as text.

    Raises:
        ValueError: one is no FIELD=VALUE, stands there twice, or has an option of its own.
    """
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {setting!r}: FIELD=VALUE, as hysteresis=0.1")
        if name in OWN_OPTIONS:
            raise ValueError(f"--set {setting}: use {OWN_OPTIONS[name]}")
        if name in fields:
            raise ValueError(f"--set {name} stands there twice, as {fields[name]!r} and {value}: give it once")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def refuse_clashes(settings: Mapping[str, Any], typed: Mapping[str, str]) -> None:
    """Raise ValueError where `--set` and an option say the same field.

    Args:
        settings: field -> value, from `--set`.
        typed: field -> the option that was typed for it.
    """
    for name, value in settings.items():
        if name in typed:
            raise ValueError(f"{typed[name]} and --set {name}={value}: both set {name}, give one of them")


def parse_tokens(text: str) -> int:
    """Return the number of "250000", "1.5M" or "7B".

    Raises:
        ValueError: something else stands there.
    """
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    unit = units.get(text[-1:].lower())
    try:
        number = float(text[:-1]) * unit if unit else float(text)
    except ValueError as error:
        raise ValueError(f"--tokens {text!r}: a number, as 250000, 1.5M or 7B") from error
    if not 1 <= number < 1e15:
        raise ValueError(f"--tokens {text!r}: at least 1")
    return round(number)
