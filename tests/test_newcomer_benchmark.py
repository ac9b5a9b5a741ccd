"""The newcomer's benchmark types what the tutorial says, in order, in one shell."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import newcomer
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return newcomer


PAGE = """# Page

```sh
not typed
```

## 1. One

```sh
cd here        # a comment
export NAME='a b'

echo "$NAME"
```

## 2. Two

```python
import sys

print(sys.argv)
```

## Next

```sh
not typed either
```
"""


def test_what_is_typed_is_the_blocks_of_the_numbered_sections(bench):
    assert bench.commands(PAGE) == [
        ("1. One", "cd here"),
        ("1. One", "export NAME='a b'"),
        ("1. One", 'echo "$NAME"'),
        ("2. Two", "python - <<'END'\nimport sys\nprint(sys.argv)\nEND"),
    ]


def test_the_tutorial_leads_from_the_clone_to_a_tuned_model(bench):
    typed = [command for _, command in bench.commands((ROOT / bench.PAGE).read_text())]
    assert typed[0] == "cd autoq"
    assert sum(command.startswith(bench.TUNED) for command in typed) == 1
    assert any("model.generate" in command for command in typed)
    assert any(command.startswith("autoq eval") for command in typed)


def test_commands_share_one_shell_and_stop_at_the_first_failure(bench, tmp_path):
    (tmp_path / "here").mkdir()
    log = tmp_path / "times"
    typed = [*bench.commands(PAGE)[:3], ("3. Three", "false"), ("4. Four", "echo never")]
    ran = subprocess.run(
        ["bash", "-c", bench.script(typed, log)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert "a b\n" in ran.stdout
    assert "never\n" not in ran.stdout
    rows = [line.split() for line in log.read_text().splitlines()]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert all(float(end) >= float(begin) for _, begin, end in rows)


def test_totals_count_up_to_the_tuned_model_and_to_the_end(bench):
    typed = [("1", "cd here"), ("2", "autoq tune model"), ("3", "python - <<'END'\nprint()\nEND")]
    found = bench.totals(typed, [1.0, 119.0, 60.0])
    assert found["tuned model"] == {"commands": 2, "lines": 2, "characters": 23, "minutes": 2.0}
    assert found["whole page"] == {"commands": 3, "lines": 5, "characters": 51, "minutes": 3.0}
