"""Print the script that completes the words of `cpd` in a shell."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence

from cpd.config import Config
from cpd.config.load import setting_lines
from cpd.config.profile import PROFILES
from cpd.programs import load_program
from cpd.run.command import exit_quietly
from jobs.__main__ import verbs
from jobs.common import parser_with_examples
from jobs.launch_options import RECIPES

SCRIPT = """\
_cpd() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" offers="" files='!*'
    if [ "$COMP_CWORD" -eq 1 ]; then
        offers="%(verbs)s --help --version"
    elif [ "$previous" = --profile ]; then
        offers="%(profiles)s" files='!*.toml'
    elif [ "${current#-}" = "$current" ]; then
        if [ "${COMP_WORDS[1]}" = launch ] && [ "$COMP_CWORD" -eq 2 ]; then
            offers="%(recipes)s" files='!*.toml'
        fi
    else
        case "${COMP_WORDS[1]}" in
%(options)s
        esac
    fi
    COMPREPLY=( $(compgen -W "$offers" -- "$current") $(compgen -f -X "$files" -- "$current") )
}
complete -o default -F _cpd cpd
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def options(module: str) -> list[str]:
    """Return the options of a verb, from its help."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        load_program(module).main(["--help"])
    return re.findall(r"^ +(?:-\w, )?(--[\w-]+)", text.getvalue(), re.MULTILINE)


def script() -> str:
    """Return the script, for bash; zsh runs it after `ZSH`."""
    settings = [line.split()[0] for line in setting_lines(Config) if line.startswith("  --")]
    cases = []
    for verb, module in verbs().items():
        words = [] if module == __name__ else options(module) + (settings if verb == "launch" else [])
        cases.append(f'            {verb}) offers="{" ".join(words)}" ;;')
    return SCRIPT % {
        "verbs": " ".join(verbs()),
        "profiles": " ".join(sorted(path.stem for path in PROFILES.glob("*.toml"))),
        "recipes": " ".join(sorted(path.stem for path in RECIPES.glob("*.toml"))),
        "options": "\n".join(cases),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd completion`; return the exit code."""
    parser = parser_with_examples(
        "jobs.completion",
        "Print a script that completes verbs, recipes, profiles, options and settings. Load it in ~/.bashrc, or "
        "in ~/.zshrc after compinit.",
        ['eval "$(cpd completion bash)"', "cpd completion zsh > ~/.cpd-completion.zsh"],
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    print((ZSH if parser.parse_args(argv).shell == "zsh" else "") + script(), end="")
    return 0


if __name__ == "__main__":
    exit_quietly(main)
