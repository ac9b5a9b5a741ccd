"""From a clone to a tuned model: the commands of docs/tutorial.md as a newcomer types them, each timed.

    python benchmarks/newcomer.py [--json FILE]

The last commit is cloned into a temporary folder, with an empty home, and every shell and Python block of the page
runs in one shell, in order, until the first that fails. Downloads count: a network's speed is in the times.
PIP_CONSTRAINT is the clone's constraints.txt: pip would else take the newest torch, whose CUDA build is several GB.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = Path("docs/tutorial.md")
TUNED = "autoq tune"  # after the command that begins so, the newcomer has a tuned model
_BLOCK = re.compile(r"^## (?P<title>.*?)$|^```(?P<language>sh|python)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBERED = re.compile(r"\d+\. ")


def commands(page):
    """What is typed, in order: (section, lines) of the numbered sections; a Python block is one command."""
    found, section = [], ""
    for match in _BLOCK.finditer(page):
        if match["title"] is not None:
            section = match["title"]
        elif not _NUMBERED.match(section):
            continue
        elif match["language"] == "python":
            lines = "".join(f"{line}\n" for line in match["text"].splitlines() if line)
            found.append((section, f"python - <<'END'\n{lines}END"))
        else:
            lines = (re.sub(r"\s+#.*", "", line) for line in match["text"].splitlines())
            found += [(section, line) for line in lines if line]
    return found


def script(typed, log):
    """A shell script that runs the commands in one shell and writes the seconds of each to a file."""
    parts = ["set -e"]
    for number, (_, command) in enumerate(typed):
        quoted = shlex.quote(command.splitlines()[0])
        parts += [f"echo; echo '$' {quoted}", "_begin=$(date +%s.%N)", command]
        parts.append(f'echo "{number} $_begin $(date +%s.%N)" >> {shlex.quote(str(log))}')
    return "\n".join(parts) + "\n"


def run(typed):
    """Seconds of each command in a fresh clone; the page's first command enters it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        home, clone, log = folder / "home", folder / "autoq", folder / "times"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
        environment |= {"HOME": str(home), "PIP_CONSTRAINT": str(clone / "constraints.txt")}
        subprocess.run(["bash", "-c", script(typed, log)], check=True, cwd=folder, env=environment)
        times = [line.split() for line in log.read_text().splitlines()]
    return [float(end) - float(begin) for _, begin, end in times]


def totals(typed, seconds):
    """What it takes up to the tuned model, and to the page's end."""
    until = 1 + next(number for number, (_, command) in enumerate(typed) if command.startswith(TUNED))
    return {
        name: {
            "commands": count,
            "lines": sum(len(command.splitlines()) for _, command in typed[:count]),
            "characters": sum(len(command) for _, command in typed[:count]),
            "minutes": sum(seconds[:count]) / 60,
        }
        for name, count in (("tuned model", until), ("whole page", len(typed)))
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    typed = commands((ROOT / PAGE).read_text())
    seconds = run(typed)
    print(f"\n{'section':16} {'seconds':>8}  command")
    for (section, command), one in zip(typed, seconds, strict=True):
        print(f"{section:16} {one:8.1f}  {command.splitlines()[0]}")
    found = totals(typed, seconds)
    for name, row in found.items():
        print(f"{name}: {row['commands']} commands, {row['lines']} lines, {row['minutes']:.1f} minutes")
    if options.json:
        rows = [
            {"section": section, "command": command, "seconds": one}
            for (section, command), one in zip(typed, seconds, strict=True)
        ]
        options.json.write_text(json.dumps({"totals": found, "commands": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
