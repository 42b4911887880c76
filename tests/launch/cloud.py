"""Commands that stand in for the cloud's: they record how they were called and answer as a test says."""

import json
import os
import shlex
import subprocess
import sys

from tests.programs import ROOT

STAND_IN = """#!{python} -SE
import json, os, sys
name, folder = os.path.basename(sys.argv[0]), {folder!r}
text = sys.stdin.read() if "--filename=-" in sys.argv else ""
with open(f"{{folder}}/calls", "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
for key, answers in json.load(open(f"{{folder}}/answers")).items():
    if key in " ".join([name, *sys.argv[1:]]):
        turns = f"{{folder}}/turns-{{key}}"
        open(turns, "a").write(".")
        out, code = answers[min(os.path.getsize(turns), len(answers)) - 1]
        (sys.stderr if code else sys.stdout).write(out and out + "\\n")
        sys.exit(code)
if text:
    open(f"{{folder}}/stdin", "w").write(text)
"""


class Cloud:
    """A folder of stand-ins, first on PATH."""

    def __init__(self, folder, *names):
        self.folder = folder
        self.environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder)}
        self.answer()
        for name in names:
            (folder / name).write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
            (folder / name).chmod(0o755)

    def answer(self, **answers):
        """To a call with that word in it: (output, exit code) for each time, the last one for ever."""
        (self.folder / "answers").write_text(json.dumps(answers))

    def launch(self, command, *more):
        """The finished script, whose command is in one text as in a document."""
        words = ["bash", *shlex.split(command), *more]
        return subprocess.run(
            words, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )

    def paste(self, lines):
        """What a person does with the output of a dry run."""
        subprocess.run(["bash"], input=lines, env=self.environment, cwd=self.folder, check=True, text=True)

    def calls(self):
        """The calls so far, as lists of words; forgets them."""
        file = self.folder / "calls"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        file.unlink(missing_ok=True)
        return calls
