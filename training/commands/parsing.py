"""A command line -> the typed settings of a command."""

import re
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict, SettingsError

from training.config import RunConfig, nearest_setting
from training.errors import ConfigError
from training.settings import ENV_PREFIX

Device = Literal["auto", "cpu", "cuda"]
Settings = TypeVar("Settings", bound=BaseSettings)

COMMAND = SettingsConfigDict(
    frozen=True,
    extra="forbid",
    use_attribute_docstrings=True,
    env_prefix=ENV_PREFIX,
    cli_kebab_case=True,
    cli_implicit_flags=True,
    cli_avoid_json=True,
    cli_hide_none_type=True,
)


def parsed(model: type[Settings], command: str, words: Sequence[str]) -> Settings:
    """Parses a command line; both `--run-dir` and `--run_dir` are understood.

    Raises:
        ConfigError: A flag that there is not; the message names the nearest.
        SettingsError: Other things that are no command line.
        ValidationError: A value that a setting cannot have.
    """
    spelled = [_with_dashes(word) for word in words]
    source = CliSettingsSource[BaseSettings](
        model, cli_prog_name=f"dino-train {command}", cli_exit_on_error=False, formatter_class=_Help
    )
    try:
        return CliApp.run(model, cli_args=spelled, cli_settings_source=source)
    except SettingsError as error:
        unknown = re.search(r"unrecognized arguments: --([\w.-]+)", str(error))
        if unknown is None:
            raise
        nearest = nearest_setting(unknown[1].replace("-", "_"), model)
        hint = re.sub(r"mean (\S+)\?", lambda found: f"mean --{found[1].replace('_', '-')}?", nearest)
        hint = hint.replace("dino-train run", f"dino-train {command}")
        raise ConfigError(f"there is no flag --{unknown[1]}{hint}") from error


class _Help(RawDescriptionHelpFormatter):
    """Says where a setting of a run comes from, instead of a default that the recipe will replace."""

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action)
        name = action.dest.split(".")[0]
        if self._prog.endswith(" run") and name in RunConfig.model_fields:
            return re.sub(r"\s*\((required|default: .*)\)$", "", text)
        return text


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
