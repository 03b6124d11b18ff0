"""The command line: all commands together, and one line on stderr for every expected failure.

Exit codes: 0 success, 2 bad input or environment, 130 interrupted. Heavy modules are imported only when a command runs,
so `ws --help` is quick.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from ws.base import console, memory
from ws.base.errors import UserError
from ws.base.version import __version__
from ws.commands.behaviours import BehaviourCommand
from ws.commands.checking import Reproduce, Verify
from ws.commands.comparisons import Ablate, Calibrate, Compare, Generalise, Sweep
from ws.commands.converting import Convert
from ws.commands.embedded import Pocket
from ws.commands.results import Export, Report, Show
from ws.commands.serving import Chat, Serve, Ui
from ws.commands.stages import Data, Diff, Eval, Replicate, Smoke, Subspace, Train

Command = (
    Annotated[Replicate, subcommand("replicate")]
    | Annotated[Smoke, subcommand("smoke")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Diff, subcommand("diff")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Subspace, subcommand("subspace")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Generalise, subcommand("generalise")]
    | Annotated[Ablate, subcommand("ablate")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Show, subcommand("show")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Reproduce, subcommand("reproduce")]
    | Annotated[Chat, subcommand("chat")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Ui, subcommand("ui")]
    | Annotated[Pocket, subcommand("pocket")]
    | Annotated[BehaviourCommand, subcommand("behaviour")]
)

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of the signal."""
_DISK_PROBLEMS = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EIO,
    errno.ENAMETOOLONG, errno.EFBIG, errno.EBUSY, errno.EXDEV, errno.ELOOP,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run a command; turn every expected failure into one line and an exit code."""
    code = _main(list(sys.argv[1:] if arguments is None else arguments))
    if code == INTERRUPTED:  # at once: threads that wait for a server would hold the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main_as(command: str) -> None:
    """`python -m ws.<module>` is an alias of the module's command."""
    main([command, *sys.argv[1:]])


def _main(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        console.say(f"weight-steering {__version__}")
        return 0
    command: Any = None
    try:
        command = _parse(arguments)
        with console.quiet(getattr(command, "json", False)):
            command.run()
    except UserError as error:
        console.fail(str(error))
        return 2
    except KeyboardInterrupt:
        console.fail("interrupted; run the same command again to continue")
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output is gone, so print nothing more
        return 0
    except OSError as error:
        if error.errno not in _DISK_PROBLEMS:
            raise
        place = error.filename or "the output folder"
        other = "another --out" if hasattr(command, "out") else "another folder"
        console.fail(f"cannot write {place}: {error.strerror}. Free space or choose {other}; run again to continue")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not memory.is_exhausted(error):
            raise
        console.fail(
            f"not enough memory ({str(error).splitlines()[0] if str(error) else 'MemoryError'}). Close other programs, "
            "lower --cache-memory, or use --dtype bfloat16 or a smaller model; run again to continue"
        )
        return 2
    return 0


def _parse(arguments: list[str]) -> Any:
    """Parse the arguments; raise a parser error as one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                Command,
                prog="ws",
                description=(
                    "Contrastive weight steering. Two opposite personas give a direction in weight space. Adding a "
                    "multiple of it to the weights makes the model more like one persona; subtracting it, more like "
                    "the other. "
                    "Start with: ws replicate"
                ),
                args=arguments,
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue()), f"See: {_help_for(arguments)}") from None


def _one_line(complaint: str) -> str:
    """The first paragraph of the parser's framed error message, with the suggested option if there is one."""
    paragraphs: list[list[str]] = [[]]
    for line in complaint.splitlines():
        text = line.strip(" │|")
        if not text or text[0] in "╭╰+┌└":
            continue
        if set(text) <= set("─-"):
            paragraphs.append([])
        else:
            paragraphs[-1].append(text)
    if "╭" not in complaint and len(paragraphs) > 1:
        del paragraphs[0]  # without box characters the title is a separate paragraph
    problem = _shortened(" ".join(paragraphs[0])) or "the arguments cannot be read"
    for first, *rest in filter(None, paragraphs[1:]):
        if first.startswith("Perhaps you meant") and rest:
            return f"{problem.rstrip('.')}; did you mean {rest[0].split()[0]}?"
        if first.startswith("Available subcommands"):
            return f"{problem.rstrip('.')}. {' '.join([first, *rest])}"
    return problem


def _shortened(problem: str) -> str:
    """Without the attempts that the parser lists for every type that an option can have."""
    found = re.match(r"Error parsing (\S+): no type matching (\S+) could be instantiated from \[(.*?)\]", problem)
    if found is None:
        return problem
    kinds = [kind.strip("{}") for kind in found[2].split("|")]
    return f"{found[1]} is {found[3]}; it takes {' or '.join(kind for kind in kinds if kind != 'None')}"


def _help_for(arguments: Sequence[str]) -> str:
    named = [word for word in arguments[:1] if not word.startswith("-")]
    return " ".join(["ws", *named, "--help"])


__all__ = ["main", "main_as"]
