"""``endcap``: one noun a subject, one verb a deed. Errors are one message and an exit code, never a traceback.

Exit codes: 0 done; 1 could not; 2 something a person wrote; 3 a package that must not be served; 4 everything ran and
an outcome that had to happen did not; 5 what was waited for goes on; 130 and 143 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer

import endcap
from endcap.cli import demo, drill, load, model, objectives, pipeline, report, rollout, serve
from endcap.cli.console import Console
from endcap.errors import EndcapError, StepError, from_os_error

__all__ = ["app", "main"]

app = typer.Typer(
    name="endcap",
    help="From a green training run to every shopper, by evidence.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, commands in (
    ("pipeline", pipeline.app),
    ("model", model.app),
    ("serve", serve.app),
    ("objectives", objectives.app),
    ("rollout", rollout.app),
    ("load", load.app),
    ("drill", drill.app),
    ("report", report.app),
):
    app.add_typer(commands, name=name)
app.command("demo", short_help="The main job, end to end, on this machine.")(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"endcap {endcap.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version and end.")
    ] = False,
) -> None:
    pass


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> None:
    """The entry point. SIGTERM unwinds like an exception, so that children are ended and files closed in order."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        code = app(standalone_mode=False)  # typer's Exit comes back as its code; Ctrl-C comes back as 130
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except EndcapError as error:
        # A step's failure is its own error's: a data file that is missing is the caller's to correct there too.
        cause = error.__cause__ if isinstance(error, StepError) else None
        _fail(str(error), cause.exit_code if isinstance(cause, EndcapError) else error.exit_code, error.to_json())
    except (typer.Abort, KeyboardInterrupt):
        Console().error("interrupted; everything that was started is ended")
        sys.exit(130)
    except SystemExit as ended:
        if ended.code == 128 + signal.SIGTERM:
            Console().error("terminated; everything that was started is ended")
        raise
    except OSError as error:
        told = from_os_error(error, doing="running this command")
        _fail(str(told), told.exit_code, told.to_json())
    except Exception as error:  # noqa: BLE001 - the last border: nobody sees a traceback unasked
        if type(error).__module__.split(".")[0] in ("click", "typer") and hasattr(error, "format_message"):
            message = error.format_message() or "see endcap --help"
            _fail(message, 2, {"error": "InputError", "what": message, "where": None, "next": "endcap --help"})
        if os.environ.get("ENDCAP_DEBUG"):
            traceback.print_exc()
        what = f"a fault of endcap's own: {type(error).__name__}: {error}"
        _fail(f"{what}\n  next: run it again with ENDCAP_DEBUG=1 and report what it prints", 1,
              {"error": "EndcapError", "what": what, "where": None, "next": None})  # fmt: skip


def _fail(text: str, code: int, document: dict[str, str | None]) -> NoReturn:
    if "--json" in sys.argv[1:] and not Console.has_answered:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    Console().error(text)
    sys.exit(code)
