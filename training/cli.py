"""`dino-train`: text -> settings -> one call. What a user can get wrong ends in one sentence and status 2."""

import sys
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console

from dino_core.errors import DinoError
from training.commands.attention import AttentionSettings, attention_command
from training.commands.check import CheckSettings, check_command
from training.commands.evaluate import EvalSettings, eval_command
from training.commands.export import ExportSettings, export_command
from training.commands.importing import ImportSettings, import_command
from training.commands.parsing import parsed
from training.commands.recipes import RecipesSettings, recipes_command
from training.commands.reduce import ReduceSettings, reduce_command
from training.commands.report import ReportSettings, report_command
from training.commands.run import run_command
from training.config import sentence_of
from training.errors import ConfigError, TrainingError
from training.settings import RunSettings

USAGE = """usage: dino-train COMMAND ...

  run        train a teacher on a folder of images; ends with a bundle in models/
  recipes    list the recipes, or print one in full
  check      look for images that cannot be read, are there twice or are too small
  eval       measure models: k-NN, linear probe, retrieval, copies, spread and rank
  import     make a bundle of weights that others made
  export     write the teacher of a checkpoint as a bundle
  reduce     centre, shorten or whiten the embeddings of a bundle
  report     write the page that explains a run, finished or not
  attention  draw where a ViT looks, and its patches as colours

dino-train COMMAND --help lists every setting of a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Of the command line; those of the process if not given.

    Returns:
        The exit status: 0, or 2 with a sentence on stderr, or 130 for a run that was asked to stop.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    if not words or words[0] in {"-h", "--help"}:
        console.print(USAGE, markup=False, highlight=False)
        return 0 if words else 2
    try:
        return _dispatch(words[0], words[1:], console)
    except (TrainingError, DinoError) as error:
        sentence = str(error)
    except ValidationError as error:
        sentence = sentence_of(error)
    except SettingsError as error:
        what = str(error).removeprefix("error parsing CLI: ")
        sentence = f"{what}; dino-train {words[0]} --help lists all settings"
    Console(stderr=True).print(
        f"dino-train: error: {sentence}", markup=False, highlight=False, soft_wrap=True
    )
    return 2


def _dispatch(command: str, words: Sequence[str], console: Console) -> int:
    match command:
        case "run":
            return run_command(parsed(RunSettings, command, words))
        case "recipes":
            recipes_command(parsed(RecipesSettings, command, words), console)
        case "check":
            return check_command(parsed(CheckSettings, command, words), console)
        case "eval":
            eval_command(parsed(EvalSettings, command, words), console)
        case "import":
            import_command(parsed(ImportSettings, command, words), console)
        case "export":
            export_command(parsed(ExportSettings, command, words), console)
        case "reduce":
            reduce_command(parsed(ReduceSettings, command, words), console)
        case "report":
            report_command(parsed(ReportSettings, command, words), console)
        case "attention":
            attention_command(parsed(AttentionSettings, command, words), console)
        case _:
            raise ConfigError(
                f"there is no command {command!r}: give run, recipes, check, eval, import, export, reduce, "
                "report or attention; --help explains them"
            )
    return 0
