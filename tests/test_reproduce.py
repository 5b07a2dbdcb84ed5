"""What the tables of the experiments count."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import reproduce  # noqa: E402
from serialize import Row  # noqa: E402
from stream import Word  # noqa: E402

ROW = Row(id="a", audio="", asr="ich habe es gekauft", st={"en": "I bought it"},
          links={"en": [(0, 0), (1, 1), (3, 1), (2, 2)]}, times=[0.5, 1.0, 1.5, 2.0])


def record(stream, words, reference):
    return {"id": "a", "references": {stream: reference.split()},
            "words": [Word(stream, text, delay, 0, 0, 0) for text, delay in words]}


def test_the_evidence_of_a_word_is_its_own():
    assert reproduce.evidence_of(ROW) == {"<asr>": [0.5, 1.0, 1.5, 2.0],
                                          "<st:en>": [0.5, 2.0, 1.5]}


def test_words_that_time_puts_elsewhere():
    """ALIGN writes "I" after 1 word, "bought" and "it" after 4; by these times "I" comes after 1,
    "bought" after 3, "it" after 4. The second row is as ALIGN has it."""
    moved = replace(ROW, st_times={"en": [0.6, 1.7, 2.1]})
    same = replace(ROW, st_times={"en": [0.6, 2.1, 2.2]})
    assert reproduce.moved_by_time([moved]) == pytest.approx(1 / 3)
    assert reproduce.moved_by_time([same]) == 0
    assert reproduce.moved_by_time([moved, same]) == pytest.approx(1 / 6)


@pytest.mark.parametrize("words, guessed, errors", [
    ([("I", 600), ("bought", 2100), ("it", 2100)], 0, 0),
    ([("I", 600), ("bought", 1900), ("it", 1900)], 100 / 3, 0),    # before "gekauft" was over
    ([("I", 600), ("sold", 1900), ("it", 1900)], 0, 1),            # wrong, so not guessed
    ([("I", 600), ("I", 700), ("bought", 2100), ("it", 2100)], 0, 1)])
def test_guessed_words(words, guessed, errors):
    metrics = dict.fromkeys(("wer", "cer", "bleu", "chrf", "laal_ms"), 1.0)
    found = reproduce.figures("<st:en>", metrics, [record("<st:en>", words, ROW.st["en"])],
                              {"a": reproduce.evidence_of(ROW)},
                              {"a": {"<st:en>": {"sold"}}})
    assert found["guessed"] == pytest.approx(guessed)
    assert found["foreign"] == pytest.approx(100 / 3 if words[1][0] == "sold" else 0)
    assert found["errors"] == [errors] and found["words"] == [3]


def test_words_of_the_wrong_language():
    """"die" is German and English here, so it says nothing; "es" is German, and Spanish only in a
    row that is Spanish."""
    german = Row(id="g", audio="", lang="de", asr="es die", st={"en": "it die"})
    spanish = Row(id="s", audio="", lang="es", asr="es rojo", st={"en": "red"})
    found = reproduce.foreign_words([(german, None), (spanish, None)])
    assert found == {"g": {"<asr>": {"rojo", "it", "red"}, "<st:en>": {"es", "rojo"}},
                     "s": {"<asr>": {"die", "it", "red"}, "<st:en>": {"es", "rojo"}}}


def test_sound_of_rows_with_one_text_or_without_times():
    """Joined, a stream has the texts that all of its rows have."""
    quiet = np.full(3 * 16000, 0.1, np.float32)
    alone = replace(ROW, st={"fr": "je l'ai acheté"}, times=[0.5, 1.0, 1.5, None])
    silent = replace(ROW, asr=None, times=None)
    row, samples = reproduce.joined([(ROW, quiet), (silent, quiet)], 0.5, None)
    assert (row.asr, row.st, len(samples)) == (None, {"en": "I bought it I bought it"}, 112000)
    row, _ = reproduce.joined([(ROW, quiet), (alone, quiet)], 0.5, None)
    assert (row.asr, row.st) == ("ich habe es gekauft ich habe es gekauft", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "through_file", lambda samples, *_, **__: samples)
        patch.setattr(reproduce, "noisy", lambda samples, *_: samples)
        items = [(ROW, quiet), (alone, quiet), (silent, quiet)]
        cut = dict(reproduce.conditions(items, items))["cut as the last word ends"]
    assert [(row, len(samples)) for row, samples in cut] == [(ROW, 32000)]


@pytest.mark.parametrize("given", [
    [], ["--strict", "--chunks", "8,16", "--dropout", "0.2", "--restrict", "0.8", "--prune", "0"],
    ["--corpus", "en-de,es", "--preset", "small", "--merges", "50", "--seed", "3"],
    ["/d/train.jsonl", "--dev", "/d/dev.jsonl", "--interleave", "time"]])
def test_latency_goes_on_as_the_run_was_made(monkeypatch, tmp_path, given):
    """With the same corpus, preset and tokenizer, or its weights would not fit."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"a model")
    import stream
    import train
    began = train.parse_options([*given, "--device", "cpu"])
    monkeypatch.setattr(reproduce, "options_of", lambda path: began)
    monkeypatch.setattr(stream, "load_run", lambda path: (None, None, {"step": 7}))
    runs, results = {}, {}
    monkeypatch.setattr(reproduce, "run", lambda name, options: runs.update({name: options}) or {
        "step": 300, "streams": {}})
    monkeypatch.setattr(reproduce, "write_result", results.__setitem__)
    reproduce.latency(path)
    assert len(runs) == 5 and len(results) == 1
    for options in runs.values():
        goes_on = train.parse_options([*options, "--device", "cpu"])
        changed = dict(init=str(path), steps=300, warm_steps=0, eval_every=300,
                       fastemit=goes_on.fastemit, delay_penalty=goes_on.delay_penalty)
        assert goes_on == replace(began, **changed)
    path.write_bytes(b"another")                               # its runs are others
    reproduce.latency(path)
    assert len(runs) == 10
    drawn = [float(o[-1]) for o in list(runs.values())[:5]
             if o[-2] in ("--fastemit", "--delay-penalty")]
    assert sorted(drawn) == [0.005, 0.005, 0.01, 0.01]


def test_of_a_log_at_most_so_many_lines_are_kept_and_the_last(tmp_path):
    (tmp_path / "done.json").write_text('{"steps": 9}')
    (tmp_path / "options.json").write_text(json.dumps([str(tmp_path / "a" / "m.jsonl"), "--seed"]))
    for n, every in ((3, 1), (200, 1), (201, 2), (1000, 5)):
        lines = [f"{50 * (k + 1)},0.5" for k in range(n)]
        (tmp_path / "log.csv").write_text("\n".join(["step,loss", *lines]) + "\n")
        found = reproduce.known_of(tmp_path)
        assert found["log"] == ["step,loss", *lines[(n - 1) % every::every]]
        assert found["log"][-1] == lines[-1] and len(found["log"]) <= 201
    assert (found["steps"], found["options"]) == (9, ["a/m.jsonl", "--seed"])


def test_seeds_are_pooled():
    one = {"wer": 10.0, "bleu": None, "errors": [1, 0], "words": [5, 5]}
    two = {"wer": 20.0, "bleu": None, "errors": [1, 1], "words": [5, 5]}
    assert reproduce.pooled([one, two]) == {"wer": 15.0, "bleu": None, "errors": [2, 1],
                                            "words": [10, 10], "wer_by_seed": [10.0, 20.0]}


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    words = [5] * 200
    align = rng.integers(0, 3, 200)
    worse = align + (rng.random(200) < 0.2)
    rows = {name: {condition: {"<asr>": {"errors": list(errors), "words": words}}
                   for condition in ("clean", "noise")}
            for name, errors in (("ALIGN", align), ("same", align), ("worse", worse))}
    found = reproduce.differences(rows)
    assert found["same"]["clean"]["<asr>"] == [0, 0, 0]
    middle, low, high = found["worse"]["noise"]["<asr>"]
    assert middle == pytest.approx(100 * (worse - align).sum() / 1000)
    assert 2 < low < middle < high < 6                             # far from 0, though each row is
    #                                                                100 * 1 / 5 = 20 % by itself


def test_tables_go_between_their_marks(tmp_path, monkeypatch, capsys):
    row = {"<asr>": {"wer": 1.25, "laal_ms": 400.0}, "<st:en>": {"wer": 2.5, "laal_ms": 1000.0}}
    results = tmp_path / "tests" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", results)
    (results / "sound.json").write_text(json.dumps({
        "date": "2026-01-01", "commit": "abc", "machine": "m", "steps": 9, "utterances": 6,
        "rows": {"clean": row}}))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- sound -->\nold\n<!-- /sound -->\nafter\n")
    reproduce.table()
    text = readme.read_text()
    assert "| clean | 1.2 | 2.5 |" in text and "old" not in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert text.startswith("before\n") and text.endswith("<!-- /sound -->\nafter\n")
    assert "## sound" in (results / "README.md").read_text()
    streams = {"<asr>": {"wer": 1.25, "cer": 1.0, "bleu": None, "chrf": 99.0, "laal_ms": None}}
    (results / "mboshi.json").write_text(json.dumps({
        "date": "2026-01-01", "commit": "abc", "machine": "m",
        "rows": {"all": {"step": 9, "seconds": 90, "streams": streams}}}))
    reproduce.table()
    text = (results / "README.md").read_text()
    assert "| all | 9 | 2 | `<asr>` | 1.2 | 1.0 |  | 99.0 |  |" in text
    readme.write_text("<!-- sound --> and no end")
    with pytest.raises(SystemExit, match="must stand there once each"):
        reproduce.table()


def test_a_run_is_done_with_its_last_evaluation_and_is_that_of_its_options(tmp_path, monkeypatch):
    import train
    from model import PRESETS
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setitem(train.PRESETS, "tiny", replace(PRESETS["tiny"], dim=16, heads=2, layers=1,
                                                       ff=32, joint_dim=16))
    monkeypatch.setattr(train.BuiltIn, "SIZE", 8)
    monkeypatch.setattr(train, "TEST_SIZE", 2)
    monkeypatch.setattr(train, "live_captions", lambda folder, options: "FILE")
    options = ["--steps", "4", "--warm-steps", "2", "--device", "cpu", "--batch-seconds", "10"]
    folder = tmp_path / "runs" / "reproduce" / "a"
    assert reproduce.left_to_do(folder, options)
    assert train.main([*options, "--out", str(folder)]) == 0
    assert not reproduce.left_to_do(folder, options)
    metrics = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text("[]")                  # killed before it was evaluated
    assert reproduce.left_to_do(folder, options)
    (folder / "metrics.json").write_text(metrics)
    (folder / "options.json").write_text(json.dumps(options))
    (folder / "done.json").write_text("{}")
    assert reproduce.train_in("a", options) == folder
    with pytest.raises(SystemExit, match="was made with other options"):
        reproduce.train_in("a", [*options, "--seed", "1"])
    assert [len(items) for _, items in [reproduce.unseen_of(folder / "model.pt", 3)]] == [3]

    # Taken on: a copy goes on, with more steps; the run that it is of stays.
    (tmp_path / "train.py").write_text("import sys; print(*sys.argv[1:], file=open('argv', 'w'))")
    monkeypatch.chdir(tmp_path)
    more = ["--resume", str(folder), "--steps", "6"]
    for _ in range(2):                                          # begun, it is not copied again
        with pytest.raises(SystemExit, match="stopped; the same command goes on"):
            reproduce.train_in("b", more)
        b = tmp_path / "runs" / "reproduce" / "b"
        assert (tmp_path / "argv").read_text().split() == ["--resume", str(b), "--steps", "6"]
        assert (b / "resume.pt").read_bytes() == (folder / "resume.pt").read_bytes()
        (folder / "log.csv").write_text("later")
    assert (b / "log.csv").read_text() != "later"
    assert not reproduce.left_to_do(b, options) and reproduce.left_to_do(b, more)


def test_the_command_takes_seeds_and_names_what_is_wrong(monkeypatch):
    asked = []
    monkeypatch.setattr(reproduce, "papers", lambda *given: asked.append(given))
    reproduce.main(["papers", "de-en"])
    reproduce.main(["papers", "de-en", "2"])
    assert asked == [("de-en",), ("de-en", "2")]
    for argv in (["papers"], ["papers", "de-en", "x"], ["sound"], ["table", "x"], ["nothing"]):
        with pytest.raises(SystemExit, match="Run the experiments"):
            reproduce.main(argv)
    done = subprocess.run([sys.executable, ROOT / "tests" / "reproduce.py", "sound", "no/model.pt"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no" in done.stderr


def test_the_table_of_the_orders_on_real_speech():
    scores = {"wer": 50.0, "cer": 20.0, "bleu": None, "chrf": None, "laal_ms": 750.0}
    rows = {name: {"step": 9, "seconds": 120, "streams": {"<asr>": scores}, "clean": {"<asr>": {
        "errors": errors, "words": [4, 4]}}} for name, errors in (("ALIGN", [1, 1]),
                                                                ("TIME", [2, 2]))}
    found = reproduce.differences(rows)
    assert found["TIME"] == {"clean": {"<asr>": [25, 25, 25]}}
    for name, row in rows.items():
        row["minus_align"] = found[name]["clean"]
    about = {"date": "d", "commit": "c", "machine": "m", "utterances": 2,
             "words_moved_by_time": 0.5, "rows": rows}
    lines = reproduce.runs_table(about)
    assert lines[5] == ("| TIME | 9 | 2 | `<asr>` | 50.0 | 20.0 |  |  | 0.75 "
                        "| +25.0 (+25.0 to +25.0) |")
    assert "TIME puts 50% of the translated words elsewhere" in lines[-1]


def test_times_are_learned_from_the_recogniser_and_the_translators_that_wait():
    rows = ["ASR", "ASR restricted", "ST en", "ST en restricted", "ALIGN", "ALIGN restricted"]
    assert list(reproduce.timing(dict.fromkeys(rows))) == ["ASR", "ST en restricted"]


def test_a_text_that_lacks_has_no_errors():
    whole = record("<asr>", [("a", 1)], "a b")
    assert reproduce.errors_of("<asr>", [whole, {"references": {}, "words": []}]) == {
        "errors": [1], "words": [2]}
    rows = {name: {"clean": {"<asr>": {"errors": [1] * n, "words": [2] * n}}}
            for name, n in (("ALIGN", 3), ("broken off", 2), ("whole", 3))}
    assert set(reproduce.differences(rows)) == {"ALIGN", "whole"}


def test_a_command_that_was_refused_does_not_hold_the_folder(tmp_path, monkeypatch):
    """Nothing was trained there, so the right command may follow the wrong one."""
    (tmp_path / "train.py").write_text("import sys; sys.exit(2)")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    for options in (["wrong"], ["right"]):
        with pytest.raises(SystemExit, match="train.py stopped, and says why above"):
            reproduce.train_in("x", options)


@pytest.mark.parametrize("argv", [["papers", "de-en", "1", "2"], ["papers", "de-en", "0"],
                                  ["papers", "de-en", "x"], ["orders"], ["table", "x"]])
def test_what_is_no_command(argv):
    with pytest.raises(SystemExit, match="Run the experiments"):
        reproduce.main(argv)


def test_results_are_searched_as_the_models_file_asks(monkeypatch):
    import stream
    from serialize import Tokenizer
    asked = {}
    monkeypatch.setattr(stream, "evaluate", lambda *_, **how: asked.update(how))
    beside = {"blank_penalty": 0.75, "tail": 0.32, "streams": ["<st:en>"]}
    reproduce.evaluated((None, Tokenizer(("<asr>", "<st:en>")), beside), [], chunk=8)
    assert asked == {"blank_penalty": 0.75, "tail": 0.32, "tags": ("<st:en>",), "chunk": 8}


def test_noise_has_the_ratio_that_the_table_states():
    rng = np.random.default_rng(0)
    x, noise = 0.1 * rng.standard_normal(16000), 3 * rng.standard_normal(16000)
    for given, db in (((), 10), ((3,), 3), ((30,), 30)):
        rest = reproduce.noisy(x, noise, *given) - x
        assert 10 * np.log10(np.mean(x ** 2) / np.mean(rest ** 2)) == pytest.approx(db, abs=0.01)


def test_what_is_scored_in_noise_is_heard_in_noise(monkeypatch):
    import serialize
    import stream
    quiet, heard, model = np.full(32000, 0.1), [], SimpleNamespace(parameters=lambda: [])
    monkeypatch.setattr(stream, "load_run", lambda path: (model, None, {}))
    monkeypatch.setattr(serialize, "read_manifest", lambda path: [])
    for name, stand_in in dict(
            choose_noise=lambda *_: 12, timed=lambda *_: "", moved_by_time=lambda rows: 0.0,
            known_of=lambda run: {"seconds": 1, "trained_at": "c", "steps": 1},
            evaluated=lambda run, items: heard.append(items[0][1]) or ({}, []),
            write_result=lambda *_: None).items():
        monkeypatch.setattr(reproduce, name, stand_in)
    reproduce.score("de-en", SimpleNamespace(unseen=lambda n: [(ROW, quiet)]), [{"ALIGN": Path()}])
    ratio = np.mean(quiet ** 2) / np.mean((heard[1] - quiet) ** 2)
    assert np.array_equal(heard[0], quiet) and 10 * np.log10(ratio) == pytest.approx(12, abs=0.01)


def test_the_rows_of_a_table_differ_in_their_order_alone(monkeypatch):
    import train
    made, runs = SimpleNamespace(sources=["de"], targets=["en"]), {}
    monkeypatch.setattr(reproduce, "train_in", lambda name, given: runs.update(
        {name: given}) or Path(name))
    monkeypatch.setattr(reproduce, "timed", lambda *_: "timed.jsonl")
    rows = reproduce.trained("de-en", made, 3)
    found = [train.parse_options([*runs[str(run)], "--device", "cpu"]) for run in rows.values()]
    assert list(rows) == ["ASR", "ST en restricted", "ALIGN", "TIME"]
    assert [(o.interleave, o.restrict) for o in found] == [
        ("asr", 0), ("st", 0.8), ("align", 0), ("time", 0)]
    assert {(o.seed, o.steps, o.warm_steps, o.prune) for o in found} == {(3, 700, 150, 0)}
    assert {Path(o.init).parent.name for o in found} == {"papers-de-en-seed3-first"}
