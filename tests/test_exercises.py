"""The exercises tell right from wrong, and wrong from wrong."""
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import exercises  # noqa: E402

NAMES = [exercise.title for exercise in exercises.EXERCISES]


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=NAMES)
def test_the_projects_own_answer_is_right(exercise):
    right, message = exercises.check(exercise, exercise.right)
    assert right and message.startswith("right on all")


@pytest.mark.parametrize("exercise,hint", [
    (exercise, hint) for exercise in exercises.EXERCISES for hint in exercise.mistakes])
def test_a_usual_mistake_is_told(exercise, hint):
    """And no other: each mistake is told from the right answer and from the other two."""
    assert exercises.check(exercise, exercise.mistakes[hint]) == (False, hint)


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=NAMES)
def test_there_are_three_mistakes_and_any_other_is_shown(exercise):
    assert len(exercise.mistakes) == 3
    right, message = exercises.check(exercise, lambda *given: None)
    assert not right and "returned None" in message
    right, message = exercises.check(exercise, lambda *given: "?")
    assert not right and "is not\n?\nbut" in message
    right, message = exercises.check(exercise, lambda *given: 1 / 0)
    assert not right and f"{exercise.name}(" in message and "ZeroDivisionError" in message


def test_a_search_without_a_limit_ends_and_other_kinds_of_lists_are_as_good():
    import numpy as np
    greedy = exercises.EXERCISES[4]

    def for_ever(toy, limit):
        labels = []
        for t in range(toy.T):
            while (k := int(np.argmax(toy.logits(t, labels)))) != toy.blank:
                labels.append(k)
        return labels
    right, message = exercises.check(greedy, for_ever)
    assert not right and "Toy(" in message and "at most `limit`" in message
    assert exercises.check(greedy, lambda *given: np.array(greedy.right(*given)))[0]

    def eats(asr, st, links):
        pairs = align.right(asr, st, links)
        asr.clear()
        return pairs[1:]
    align = exercises.EXERCISES[2]
    right, message = exercises.check(align, eats)
    assert not right and "ieri" in message                     # the inputs as they were given


def test_the_texts_state_true_numbers():
    import numpy as np
    half = np.full((2, 1), np.log(0.5))
    assert exercises.forward_right(half, half) == pytest.approx(1.386294, abs=1e-6)
    assert exercises.posteriors_right(half, half)[-1, -1, 0] == 1
    assert exercises.mask_right(4, 2, 0).tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2
    assert exercises.laal_right([1000, 2000, 3000], 3000, 3) == 1000
    assert exercises.greedy_right(exercises.Toy(0, 5), 1) == [1, 3, 3, 1]
    words = [word for _, word in exercises.align_right(*exercises.sentences()[0])]
    assert words == ("ieri yesterday ho comprato I bought una a macchina rossa red car".split())


def test_greedy_is_the_search_of_the_program():
    """The toy as a network would do: stream.py's own greedy search over the same logits."""
    import torch
    from dataclasses import replace
    from model import PRESETS, Transducer
    from stream import greedy_batch
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"], layers=1, label_layers=1, dim=16, ff=16, heads=2,
                     kernel=0, joint_dim=16, vocab=9, ctc_vocab=2)
    model, mel = Transducer(config).eval(), torch.randn(1, 160, config.n_mels)

    class Network:
        blank, T = 0, 160 // config.subsampling

        def logits(self, t, labels):
            given = torch.tensor([labels], dtype=torch.long)
            return model(mel, given, chunk=4)[0, t, len(labels)].numpy()
    with torch.no_grad():
        model.joint.output.bias[0] += 0.2                      # some frames without a label
        written, _ = greedy_batch(model, mel, torch.tensor([160]), 4, (3, 3))[0]
        assert 5 < len(written) < 3 * Network.T
        assert exercises.greedy_right(Network(), 3) == written
        assert exercises.moves_on_labels(Network(), 3) != written


def run(*arguments):
    command = [sys.executable, str(Path(exercises.__file__)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command(tmp_path):
    listed = run()
    assert listed.returncode == 0 and all(name in listed.stdout for name in NAMES)
    assert "define laal(delays, source_ms, n_reference)" in run(6).stdout
    answer = tmp_path / "my.py"
    answer.write_text("def mask(n, chunk, left):\n    import numpy as np\n"
                      "    c = np.arange(n) // chunk\n    back = c[:, None] - c\n"
                      "    return (back >= 0) & (back <= left)\n")
    done = run(4, answer)
    assert done.returncode == 0 and done.stdout.startswith("right: right on all 6 inputs")
    answer.write_text(answer.read_text().replace("back <= left", "True"))
    done = run(4, answer)
    assert done.returncode == 1 and "the past has no end in yours" in done.stdout
    assert "defines no function laal" in run(6, answer).stderr
    assert "no such file" in run(6, tmp_path / "none.py").stderr
    assert run(7).returncode == 2 and "exercises 1 to 6" in run(7).stderr


def test_an_answer_that_is_no_file_of_python(tmp_path):
    (tmp_path / "my.txt").write_text("def alpha(): pass")
    with pytest.raises(SystemExit, match="my.txt: a file of Python ends in .py"):
        exercises.load_answer(str(tmp_path / "my.txt"), "alpha")
    for slip, said in (("import sys; sys.exit(0)", "SystemExit: 0"),
                       ("def alpha(:", "SyntaxError")):
        (tmp_path / "my.py").write_text(slip)
        with pytest.raises(SystemExit, match=f"my.py: {said}"):
            exercises.load_answer(str(tmp_path / "my.py"), "alpha")


def test_numbers_are_equal_to_a_millionth():
    assert exercises.same(1000.0005, 1000) and not exercises.same(1000.009, 1000)


def test_a_word_that_comes_again_is_another_word():
    """Needs kept by the word itself, and not by its place, are wrong."""
    from serialize import needs

    def by_word(source, target, links):
        need = {}
        for word, last in zip(target, needs(len(source), target, links)):
            need[word] = max(last, need.get(word, last))
        return exercises.in_order(source, target, [need[word] for word in target])
    assert not exercises.check(exercises.EXERCISES[2], by_word)[0]


def test_a_search_that_never_moves_on_is_told_so():
    def stuck(toy, limit):
        labels, t = [], 0
        while t < toy.T:
            if (k := int(toy.logits(t, labels).argmax())) == toy.blank:
                continue
            labels.append(k)
            t += 1
        return labels
    right, told = exercises.check(exercises.EXERCISES[4], stuck)
    assert not right and "at a blank the next one's turn comes" in told


def test_answers_of_other_kinds_are_right_too(tmp_path):
    import torch
    assert exercises.check(exercises.EXERCISES[4], lambda toy, limit: torch.tensor(
        exercises.greedy_right(toy, limit)))[0]

    def generated(toy, limit):
        yield from exercises.greedy_right(toy, limit)
    assert exercises.check(exercises.EXERCISES[4], generated)[0]
    learned = torch.ones(2, requires_grad=True)
    assert exercises.same(learned, [1.0, 1.0]) and not exercises.same([learned, 1], [2.0, 1])
    (tmp_path / "helper.py").write_text("ONE = 1\n")
    (tmp_path / "my.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from helper import ONE\n@dataclass\nclass A:\n    x: int = ONE\n"
        "def laal(delays, source_ms, n_reference):\n    return A().x\n")
    assert exercises.load_answer(str(tmp_path / "my.py"), "laal")([], 1, 1) == 1
