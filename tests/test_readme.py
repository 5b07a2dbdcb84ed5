"""The README's two commands exist as written, run what they say, and CI runs the second."""
import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
sys.path.insert(0, str(ROOT))
MAIN = "pip install -r requirements.txt && python train.py"
TESTS = "pip install -r requirements.txt && pytest -n 2"


def test_the_two_commands_stand_alone_on_a_line():
    lines = [line.strip() for line in README.splitlines()]
    assert lines.count(MAIN) == 1 and lines.count(TESTS) == 1


def test_ci_takes_its_command_from_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"sed -n 's/(.*)/\\1/p' README.md", script).group(1)
    pattern = pattern.replace("\\(", "(").replace("\\)", ")")
    assert [line.strip() for line in README.splitlines() if re.match(pattern, line)] == [TESTS]


def test_requirements_name_every_package_that_is_imported():
    named = set(re.findall(r"^([a-z]+)", (ROOT / "requirements.txt").read_text(), re.M))
    local = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]}
    # Imported only where the user has them.
    late = {"sounddevice", "transformers", "torchaudio", "warprnnt_numba", "tokenizers"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                package = name.split(".")[0]
                known = named | local | late | set(sys.stdlib_module_names)
                assert package in known, f"{path.name} imports {package}"


def test_files_named_in_the_readme_exist():
    for name in set(re.findall(r"\b((?:tests/)?[a-z_]+\.py)\b", README)):
        assert (ROOT / name).exists(), name


def test_the_house():
    allowed = {"README.md", "requirements.txt", "LICENSE", "tests"} | {
        f"{name}.py" for name in ("model", "rnnt_loss", "align", "serialize", "train", "stream")}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = listed.stdout.split()
    assert {path.split("/")[0] for path in tracked if not path.startswith(".")} <= allowed
    long = [f"{path}:{n}" for path in tracked if path.endswith((".py", ".html"))
            for n, line in enumerate((ROOT / path).read_text("utf-8").splitlines(), 1)
            if len(line) > 100]
    assert not long, long


def test_the_files_need_no_package_but_those_of_runtime():
    """Those for tests, scores, pictures and the microphone are imported where they are used."""
    code = ("import sys\nfor name in ('pytest', 'hypothesis', 'sacrebleu', 'matplotlib', "
            "'sounddevice', 'transformers', 'tokenizers'):\n    sys.modules[name] = None\n"
            "import model, rnnt_loss, align, serialize, stream, train\n"
            "stream.summarise([], ['<asr>'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
@pytest.mark.parametrize("command", [
    ["model.py"], ["serialize.py"], ["tests/exercises.py"]])
def test_a_reader_who_has_seen_enough_is_no_error(command):
    """As with `python model.py | head -1`; here the pipe has no reader from the start."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=write, text=True,
                          stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command, told", [
    (["align_steps.py", "none.pairs", "--gold", "none.gold"], "none.pairs"),
    (["long_streams.py", "none.pt", "none.jsonl"], "none.pt: no such file"),
    (["long_streams.py", "none.pt", "none.jsonl", "--seconds", "nan"], "--seconds nan"),
    (["bench.py", "tokenizer", "cut.gz"], "end-of-stream marker"),
    (["mutate.py", "trian.py", "0"], r"neither a number from 1 to \d+ nor a file .*: 0 trian.py"),
    (["fuzz.py", "--cases", "0"], "--cases is 0"),
    (["reproduce.py", "sound", "none.pt"], "none.pt")])
def test_a_tools_mistaken_user_is_told_in_one_line(command, told, tmp_path):
    import gzip
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a b c\n" * 1000)[:-12])
    done = subprocess.run([sys.executable, ROOT / "tests" / command[0], *command[1:]], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and re.search(told, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_mutations_stand_once_in_their_files():
    """Or tests/mutate.py, which runs them for half an hour, would try others than it says."""
    sys.path.insert(0, str(ROOT / "tests"))
    from mutate import MUTATIONS
    for file, right, *_ in MUTATIONS:
        assert (ROOT / file).read_text("utf-8").count(right) == 1, (file, right)


def test_tables_are_those_of_the_result_files():
    sys.path.insert(0, str(ROOT / "tests"))
    from reproduce import RESULTS, table_of
    tables = (RESULTS / "README.md").read_text("utf-8")
    made = {path.stem: "\n".join(table_of(path)) for path in RESULTS.glob("*.json")}
    assert re.findall(r"^## ([\w,-]+)$", tables, re.M) == sorted(made)
    for table in made.values():
        assert table in tables
    shown = re.findall(r"<!-- ([^/].*?) -->", README)
    assert shown == ["papers-de,es,it-en"]
    for name in shown:
        assert f"<!-- {name} -->\n{made[name]}\n<!-- /{name} -->" in README, name
    assert README.count("\n") < 250


# ---- commands and snippets -----------------------------------------------------------------------

def commands():
    """(script, arguments) of every command in the README: a line of code, or one between
    backticks, over two lines too."""
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    blocks = [line[4:].split("  #")[0] for line in prose.splitlines() if line.startswith("    ")]
    inline = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose)]
    for text in blocks + inline:
        for part in re.split(r"&&|\|", text):
            match = re.match(
                r"\s*(?:(?:python|torchrun \S+) )?((?:tests/)?\w+\.py)(?: (.*))?$", part)
            if match and (" " in part.strip() or "python" in part):    # not a name alone
                yield match[1], (match[2] or "").replace("...", "").split()


def parse(script, arguments):
    """With the parser of the script itself; SystemExit where it refuses."""
    import align
    import serialize
    import stream
    import train
    sys.path.insert(0, str(ROOT / "tests"))
    import align_steps
    import bench
    import figures
    import long_streams
    import reproduce
    known = {
        "train.py": lambda a: train.make_parser().parse_args(a),
        "stream.py": lambda a: stream.arguments().parse_args(a),
        "align.py": align.parse_options,
        "serialize.py": serialize.read_arguments,
        "tests/figures.py": lambda a: a and figures.make_parser().parse_args(a),
        "tests/bench.py": lambda a: a and bench.make_parser().parse_known_args(a),
        "tests/align_steps.py": lambda a: align_steps.make_parser().parse_args(a),
        "tests/long_streams.py": lambda a: long_streams.make_parser().parse_args(a),
        "tests/reproduce.py": reproduce.parse,
        "tests/exercises.py": lambda a: None,
    }
    known[script](arguments)


def test_every_command_of_the_readme_is_one():
    found = list(commands())
    assert len(found) > 20 and {script for script, _ in found} >= {"train.py", "stream.py"}
    for script, arguments in found:
        assert (ROOT / script).is_file(), script
        parse(script, arguments)
    for script, wrong in (("train.py", ["--no-such-flag", "3"]), ("tests/reproduce.py", ["sounds"]),
                          ("tests/reproduce.py", ["search"]), ("tests/bench.py", ["los"])):
        with pytest.raises(SystemExit):                        # negative controls
            parse(script, wrong)


def test_the_shell_makes_a_table_of_recordings_with_a_file_for_each_text(tmp_path):
    """The README's two lines, in a folder as that of Mboshi is."""
    import numpy as np
    import soundfile
    from serialize import read_manifest
    for name, mboshi, french in (("a b", "wa é", "il \\ est"), ("c", "bé", "oui")):
        soundfile.write(tmp_path / f"{name}.wav", np.full(8000, 0.1), 16000)
        (tmp_path / f"{name}.mb.cleaned").write_text(mboshi + "\n", "utf-8")
        (tmp_path / f"{name}.fr.cleaned").write_text(french + "\n", "utf-8")
    lines = README.split("the shell makes the table:\n\n")[1].split("\n\n")[0].splitlines()
    assert len(lines) == 2
    for line in lines:
        line = line.strip().replace("python serialize.py", f"{sys.executable} {ROOT}/serialize.py")
        subprocess.run(["sh", "-ec", line], cwd=tmp_path, check=True)
    rows = read_manifest(tmp_path / "all.jsonl")
    assert [(Path(row.audio).name, row.asr, row.st, row.duration) for row in rows] == [
        ("a b.wav", "wa é", {"fr": "il \\ est"}, 0.5), ("c.wav", "bé", {"fr": "oui"}, 0.5)]


def test_every_flag_in_the_readmes_tables_is_train_pys():
    import train
    cells = re.findall(r"^\| \d+ \|.*?\| `(--[^`]*)`", README, re.M)
    assert len(cells) == 4
    for cell in cells:
        train.make_parser().parse_args(cell.split())


def test_every_flag_of_the_readme_is_somebodys(capsys):
    """In prose too. torchrun's own is not ours."""
    known = {"--nproc_per_node"}
    for script in ("train.py", "stream.py", "align.py", "serialize.py", "tests/figures.py",
                   "tests/align_steps.py"):
        with pytest.raises(SystemExit):
            parse(script, ["--help"])
        known |= set(re.findall(r"--[a-z_-]+", capsys.readouterr().out))
    known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "tests" / "bench.py").read_text("utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README))
    assert len(named) > 20 and not named - known, named - known


def test_the_snippets_run(tmp_path):
    """The last one reads a model of the main job; here it gets one that has learned nothing, and
    tones."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) == 4
    for snippet in snippets[:3]:
        exec(compile(snippet, "README.md", "exec"), {})
    bench = pytest.importorskip("bench")
    from model import PRESETS, Transducer, save
    from serialize import Tokenizer
    tokenizer = Tokenizer.train(["ab"], 300, ["<asr>", "<st:en>"])
    model = Transducer(replace(PRESETS["tiny"], vocab=len(tokenizer)))
    save(tmp_path / "model.pt", model, tokenizer=tokenizer.to_dict(), blank_penalty=0.25)
    lines = snippets[3].replace("runs/de-en/model.pt", str(tmp_path / "model.pt"))
    space = {"packets": bench.tones(0, 2).reshape(-1, 1600)}
    exec(compile(lines, "README.md", "exec"), space)
    streamer = space["streamer"]
    assert isinstance(space["words"], list) and streamer.received >= 32000
    assert streamer.search.blank_penalty == 0.25               # what the file asks for
