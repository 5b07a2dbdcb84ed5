"""The pictures are drawn, and the replay page shows at every time the words that were out by
then."""
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import figures  # noqa: E402
import model as m  # noqa: E402
from serialize import Tokenizer  # noqa: E402
from stream import Word  # noqa: E402

soundfile, bench = pytest.importorskip("soundfile"), pytest.importorskip("bench")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def planted(folder, words, seconds):
    """A model that writes these words, one a tone, in two streams, and a recording of tones."""
    tokenizer = Tokenizer(("<asr>", "<st:en>"))
    labels = []
    for tag, word in words:
        labels += [tokenizer.tag_id[tag], *tokenizer.encode_word(word)]
    config = replace(m.PRESETS["tiny"], vocab=len(tokenizer))
    m.save(folder / "model.pt", bench.planted(config, labels), tokenizer=tokenizer.to_dict())
    soundfile.write(folder / "tones.wav", bench.tones(0, seconds), 16000)
    return folder / "model.pt", folder / "tones.wav"


def draw(*arguments):
    """-> returncode and stderr, as of a process of its own, of which each would take seconds to
    import what it needs."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            figures.main(list(map(str, arguments)))
        code = 0
    except SystemExit as end:
        code = end.code
    return SimpleNamespace(returncode=code, stderr=said.getvalue())


def size(path):
    from matplotlib import image
    return image.imread(path).shape[:2]


def test_a_long_timeline_is_rows_and_not_a_wider_picture(tmp_path):
    pytest.importorskip("matplotlib")
    model, tones = planted(tmp_path, [("<asr>", "a")], 20)
    short, long = tmp_path / "short.png", tmp_path / "long.png"
    assert draw("timeline", model, tones, "--duration", 4, "-o", short).returncode == 0
    assert draw("timeline", model, tones, "-o", long).returncode == 0
    assert size(short)[1] == size(long)[1] == 1600
    assert size(long)[0] > 2.5 * size(short)[0]                # three rows of under seven seconds


def test_mask_links_and_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.csv").write_text("step,letters,transducer\n50,3.1,\n100,2.0,\n150,1.5,4.0\n")
    (tmp_path / "money.pairs").write_text("Ke$$a zahlt $1_$2 ||| Ke$$a pays $5/$6\n")
    for arguments in (["mask"], ["curves", run], ["links"],
                      ["links", "--pairs", tmp_path / "money.pairs", "--lines", "0"]):
        done = draw(*arguments, "-o", tmp_path / "a.png")
        assert done.returncode == 0, done.stderr
        assert min(size(tmp_path / "a.png")) > 300
    missing = draw("curves", tmp_path, "-o", tmp_path / "b.png")
    assert missing.returncode == 2 and "log.csv: no such file" in missing.stderr
    (run / "log.csv").write_text("step,letters,transducer\n")
    for arguments, message in ((["curves", run], "no losses yet"),
                               (["links", "--lines", "1000"], "--lines 1000: there are 1000"),
                               (["replay", tmp_path / "none.pt", "a.wav"], "none.pt: no such file"),
                               (["replay", tmp_path / "none.pt", "a.wav"], "figures.py: ")):
        page = arguments[0] == "replay"
        missing = draw(*arguments, "-o", tmp_path / ("b.html" if page else "b.png"))
        assert missing.returncode == 2 and message in missing.stderr, arguments
    (run / "log.csv").write_text("no log\n1\n")
    (tmp_path / "bad.pairs").write_text("ein Haus a house\n")
    for arguments, message in ((["curves", run], "log.csv: not the log of a run"),
                               (["links", "--pairs", tmp_path / "bad.pairs"], "bad.pairs:1"),
                               (["links", "--gold", "x"], "--gold goes with --pairs"),
                               (["mask", "-o", "x.xyz"], "-o x.xyz: a picture ends in ."),
                               (["mask", "-o", "mask"], "-o mask: a picture ends in"),
                               (["tradeoff", "--results", run / "log.csv"], "not what reproduce")):
        more = [] if "-o" in arguments else ["-o", tmp_path / "b.png"]
        missing = draw(*arguments, *more)
        assert missing.returncode == 2 and message in missing.stderr, arguments
    for content in ('{"rows": {"a": {"<asr>": {}}}}', "", '{"rows": []}', '{"rows": {}}'):
        (tmp_path / "search.json").write_text(content)
        missing = draw("tradeoff", "--results", tmp_path / "search.json")
        assert missing.returncode == 2 and "search.json: not what" in missing.stderr, content
    missing = draw("tradeoff", "--results", tmp_path / "none.json")
    assert missing.returncode == 2 and "reproduce.py search RUN/model.pt" in missing.stderr


@pytest.mark.parametrize("arguments", [
    ["mask", "--chunk", "0"], ["mask", "--frames", "-3"], ["mask", "--left", "x"],
    ["lattice", "model.pt", "--width", "1"], ["lattice", "model.pt", "--utterance", "-1"],
    ["links", "--lines", "4,a"], ["links", "--lines", "-1"], ["replay", "model.pt", "a.wav",
                                                              "--chunks", "16,,32"]])
def test_numbers_that_make_no_picture_are_named(arguments):
    refused = draw(*arguments)
    assert refused.returncode == 2 and "is not a whole number from" in refused.stderr


@pytest.mark.parametrize("arguments", [("--start", "nan"), ("--start", "-5"), ("--duration", "inf"),
                                       ("--duration", "x")])
def test_odd_seconds_are_named(arguments):
    refused = draw("timeline", "model.pt", "a.wav", *arguments)
    assert refused.returncode == 2
    assert f"'{arguments[1]}' is not a number of seconds" in refused.stderr


# What a page must not take for its own markup, what is written from right to left, and marks that
# combine with the letter before.
WORDS = [("<asr>", "<script>x</script>"), ("<st:en>", "שלום"), ("<asr>", "e\u0301te&amp;"),
         ("<st:en>", '"quoted"'), ("<asr>", "DATA"), ("<st:en>", "SOUND")]


def heard(checkpoint, path, start=0.0, duration=None, chunk=None):
    """As figures.heard would find them: a word every 0.4 s, shown when its chunk is complete."""
    chunk_s = 0.04 * chunk
    words = [Word(tag, text, 1000 * chunk_s * np.ceil(0.4 * (k + 1) / chunk_s),
                  start_s=0.4 * k, end_s=0.4 * (k + 1), elapsed_ms=0.0, confidence=1.0)
             for k, (tag, text) in enumerate(WORDS)]
    return bench.tones(0, 4), words, ("<asr>", "<st:en>"), chunk_s


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "heard", heard)
        figures.replay(SimpleNamespace(checkpoint="", file="a <b>.wav", chunks=[4, 16],
                                       output=path))
    return path


def test_a_page_takes_the_place_of_no_recording(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"sound")
    refused = draw("replay", "model.pt", tmp_path / "a.wav", "-o", tmp_path / "a.wav")
    assert refused.returncode == 2 and "the name of a page ends in .html" in refused.stderr
    assert (tmp_path / "a.wav").read_bytes() == b"sound"


def test_a_stream_that_only_one_chunk_size_has(tmp_path, monkeypatch, capsys):
    """A stray word before any tag; and where there is none at all, that is said."""
    def found(checkpoint, path, start=0.0, duration=None, chunk=None):
        sound, words, _, chunk_s = heard(checkpoint, path, chunk=chunk)
        tags = ("<st:en>", "<asr>") if chunk == 4 else ("<st:en>",)
        return sound, [word for word in words if word.stream in tags], tags, chunk_s
    options = SimpleNamespace(checkpoint="", file="a.wav", chunks=[4, 16],
                              output=tmp_path / "page.html")
    monkeypatch.setattr(figures, "heard", found)
    figures.replay(options)
    data = data_of(options.output)
    assert data["streams"] == ["st:en", "asr"]
    assert [{word["stream"] for word in version["words"]} for version in data["versions"]] == [
        {0, 1}, {0}]
    assert "no word" not in capsys.readouterr().err
    monkeypatch.setattr(figures, "heard", lambda *how, **more: (bench.tones(0, 1), [], (), 0.64))
    figures.replay(options)
    assert "writes no word for a.wav" in capsys.readouterr().err


def data_of(page):
    text = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8")).group(1)
    return json.loads(text)


def test_the_page_holds_all_and_no_word_ends_its_script(page):
    data = data_of(page)
    for version, chunk in zip(data["versions"], (4, 16)):
        words = heard("", "", chunk=chunk)[1]
        assert [w["text"] for w in version["words"]] == [w.text for w in words]
        assert [w["shown"] for w in version["words"]] == pytest.approx(
            [w.delay_ms / 1000 for w in words], abs=1e-3)
        assert [w["space"] for w in version["words"]] == [False] * 2 + [True] * 4
    assert data["streams"] == ["asr", "st:en"]
    text = page.read_text(encoding="utf-8")
    assert "http" not in text and text.count("</script>") == 2


def test_a_page_of_a_real_run(tmp_path):
    model, tones = planted(tmp_path, [("<st:en>", "a")], 2)
    done = draw("replay", model, tones, "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    versions = data_of(tmp_path / "page.html")["versions"]
    assert len(versions) == len(m.PRESETS["tiny"].chunks)
    assert all(word["text"] == "a" for word in versions[0]["words"]) and versions[0]["words"]


def in_chromium(page, fragment):
    """The page after its scripts ran at this place, and the errors on its console."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=4000", "--dump-dom",
         f"{page.as_uri()}#{fragment}"], capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
@pytest.mark.parametrize("at,version", [(0, 0), (1.0, 0), (2.0, 1), (3.0, 0)])
def test_the_page_shows_what_was_out_by_then(page, at, version):
    import html
    dom, console = in_chromium(page, f"t={at}&chunk={version}")
    assert not console, console
    data, wanted = data_of(page), {}
    for word in sorted(data["versions"][version]["words"], key=lambda word: word["shown"]):
        if word["shown"] <= at + 1e-3:
            wanted.setdefault(word["stream"], []).append(word["text"])
    for stream in (0, 1):
        caption = re.search(rf'<p dir="auto" id="caption-{stream}">(.*?)</p>', dom, re.S).group(1)
        words = re.findall(r'<span class="word[^"]*">(.*?)</span>', caption, re.S)
        assert [html.unescape(word) for word in words] == wanted.get(stream, [])
    assert at == 0 or wanted                                   # else nothing was compared


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
@pytest.mark.parametrize("fragment", ["t=3&chunk=9", "t=3&chunk=x"])
def test_a_chunk_size_that_is_none_is_the_first(page, fragment):
    dom, console = in_chromium(page, fragment)
    assert not console, console
    assert in_chromium(page, "t=3&chunk=0")[0].count('class="word') == dom.count('class="word') > 2


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_the_switch_and_the_words_of_the_page_work(page, tmp_path):
    """Opened at 3 s with the first chunk size, switched to the second; then a click on a word."""
    acting = """<script>sound.play = () => {};    // it would wait for a person
    setTimeout(() => {
        const pick = document.getElementById("chunk"), kept = document.body.dataset;
        pick.value = 1;
        pick.onchange({target: pick});
        kept.delay = document.getElementById("delay").textContent;
        kept.out = document.querySelectorAll(".bar.out").length;
        [...document.querySelectorAll(".word")].find(word => word.textContent === "DATA").click();
        kept.at = sound.currentTime;
    }, 1500)</script></body>"""
    copy = tmp_path / "page.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    copy.write_text(text.replace("</body>", acting), encoding="utf-8")
    dom, console = in_chromium(copy, "t=3&chunk=0")
    assert not console, console
    found = dict(re.findall(r'data-(\w+)="(.*?)"', re.search(r"<body.*?>", dom)[0]))
    words = sorted(data_of(page)["versions"][1]["words"], key=lambda word: word["shown"])
    lags = []
    for stream in (0, 1):
        own = [word for word in words if word["stream"] == stream]
        lags += [word["shown"] - k * 4 / len(own) for k, word in enumerate(own)
                 if word["shown"] <= 3.001]
    assert found["out"] == str(len(lags)) and len(lags) > 4
    assert found["delay"] == f"{np.mean(lags):.2f} s"
    clicked, = [word for word in words if word["text"] == "DATA"]
    assert float(found["at"]) == pytest.approx(clicked["start"] - 0.3, abs=1e-3)
