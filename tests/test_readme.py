"""The README's two commands exist as written, run what they say, and CI runs the second."""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MAIN, TESTS = "pip install -r requirements.txt && python train.py", "pip install -r requirements.txt && pytest"


def test_the_two_commands_stand_alone_on_a_line():
    lines = [line.strip() for line in README.splitlines()]
    assert lines.count(MAIN) == 1 and lines.count(TESTS) == 1


def test_ci_takes_its_command_from_the_readme():
    pattern = re.search(r"sed -n 's/(.*)/\\1/p' README.md", (ROOT / ".ci" / "run").read_text()).group(1)
    pattern = pattern.replace("\\(", "(").replace("\\)", ")")
    assert [line.strip() for line in README.splitlines() if re.match(pattern, line)] == [TESTS]


def test_requirements_name_every_package_that_is_imported():
    named = set(re.findall(r"^([a-z]+)", (ROOT / "requirements.txt").read_text(), re.M))
    local = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]}
    late = {"sounddevice", "transformers", "torchaudio", "warprnnt_numba", "tokenizers"}  # imported only where the user has them
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for name in names:
                package = name.split(".")[0]
                assert package in named | local | late | set(sys.stdlib_module_names), f"{path.name} imports {package}"


def test_files_named_in_the_readme_exist():
    for name in set(re.findall(r"\b((?:tests/)?[a-z_]+\.py)\b", README)):
        assert (ROOT / name).exists(), name


def test_the_house():
    allowed = {"README.md", "requirements.txt", "LICENSE", "tests"} | {
        f"{name}.py" for name in ("model", "rnnt_loss", "align", "serialize", "train", "stream")}
    import subprocess
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {path.split("/")[0] for path in tracked if not path.startswith(".")} <= allowed
