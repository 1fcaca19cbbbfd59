"""Run one verb: `cpd VERB ...`, also as `python -m jobs VERB ...` in a clone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence

from cpd.programs import ROOT, load_program
from cpd.reading import read_text
from cpd.run.command import EXIT_USAGE, exit_quietly


def verbs() -> dict[str, str]:
    """Return the module of every verb: the files of jobs/ that define `main`, and `analysis.build`."""
    files = [path for path in (ROOT / "jobs").glob("[!_]*.py") if "\ndef main(" in read_text(path)]
    return dict(
        sorted(
            {
                "build": "analysis.build",
                **{path.stem.replace("_", "-"): f"jobs.{path.stem}" for path in files},
            }.items()
        )
    )


def help_lines() -> list[str]:
    """Return the usage, with a line for every verb: its name and the first line of its module's docstring."""
    lines = ["usage: cpd VERB [arguments]    (cpd VERB --help explains one, cpd --version prints the version)", ""]
    for verb, module in verbs().items():
        text = read_text((ROOT / module.replace(".", "/")).with_suffix(".py"))
        lines.append(f"  {verb:<12}{(ast.get_docstring(ast.parse(text)) or '').partition(chr(10))[0]}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd`; return the exit code."""
    verb, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print("\n".join(help_lines()))
    elif verb == "--version":
        from cpd.run.provenance import code_version

        print(f"cpd {code_version()}")
    elif module := verbs().get(verb):
        code: int = load_program(module).main(arguments)
        return code
    else:
        from cpd.config.load import suggestion

        print(f"cpd: unknown verb {verb!r}{suggestion(verb, verbs())}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    exit_quietly(main)
