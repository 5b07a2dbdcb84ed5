"""Every timing table, each by one command.

    python tests/bench.py loss [--joint]     rnnt_loss beside a copy of the logits, log_softmax and
                                             installed peers
    python tests/bench.py train [FLAGS]      where a training step's time goes, phase by phase
    python tests/bench.py stream             chunks, real-time factors, where the time goes, an hour
                                             of audio
    python tests/bench.py tokenizer FILE...  training and encoding, a sentence a line, .gz or not
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in train.py and stream.py

import argparse
import gzip
import hashlib
import math
import platform
import resource
import statistics
import sys
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from oneline import told

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def machine():
    """One line for under a table: a figure means nothing without it."""
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, "
        f"{torch.get_num_threads()} thread(s)"
    )


# ---- stream: the network and the search, chunk by chunk ------------------------------------------
#
# Random weights write nothing or everything, and then there is no search to time. So three tones,
# 10 a second, are planted in noise, and three units of every layer on the way are set by hand so
# that the network hears them: the tone and the label written last decide together what is written
# next, one label a tone. All else stays random, and every product is computed as in a trained
# network.

TONES = (500.0, 1500.0, 3500.0)
LABELS_PER_S = 10


def tones(start_s, seconds, seed=0):
    """`seconds` of the planted audio from `start_s` on, the same wherever it is cut at whole
    seconds."""
    at = np.arange(round(seconds * 16000)) / 16000
    hz = np.array(TONES)[(np.floor((start_s + at) * LABELS_PER_S) % 3).astype(int)]
    noise = np.random.default_rng((seed, round(start_s))).standard_normal(len(at))
    return (0.3 * np.sin(2 * np.pi * hz * (at % 1)) + 0.01 * noise).astype(np.float32)


@torch.no_grad()
def planted(config, labels):
    """A model that writes labels[k] when it hears tone k after tone k - 1."""
    from model import Transducer, log_mel
    torch.manual_seed(0)
    model = Transducer(config).eval()
    encoder, joint = model.encoder, model.joint
    # a tone is about 1.7, the noise -1
    encoder.set_statistics(torch.tensor(0.0), torch.tensor(4.0))
    for k, hz in enumerate(TONES):
        tone = torch.sin(2 * torch.pi * hz * torch.arange(400) / 16000) * 0.3
        unit = log_mel(tone)[0].argmax()  # the band that hears it
        for conv in encoder.convolutions:
            conv.weight[k], conv.bias[k] = 0, 0
            conv.weight[k, -conv.in_features // 3 + unit] = 1
            unit = k
        encoder.project.weight[k], encoder.project.bias[k] = 0, 0
        encoder.project.weight[k, k] = 12 * (config.dim / 144) ** 0.5
        model.label_encoder.embedding.weight[:, k] = 0
        for proj, dim in ((joint.encoder_proj, k), (joint.label_proj, (k - 1) % 3)):
            # heard: about 1, not heard: -4.5; so the sum is an AND
            proj.weight[k], proj.bias[k] = (0, -4.5)
            proj.weight[k, dim] = 6 / config.dim**0.5
    for k, label in enumerate(labels):
        model.label_encoder.embedding.weight[label, k] = 20 * (config.dim / 144) ** 0.5
        joint.output.weight[label, k] = 50
    model.label_encoder.embedding.weight[0, 2] = 20 * (config.dim / 144) ** 0.5
    joint.output.bias[0] = 15
    return model


def planted_streamer(preset, **options):
    """-> a function that makes a Streamer, all on one model. The labels spell words of three
    letters."""
    from model import PRESETS
    from serialize import Tokenizer
    from stream import Streamer

    class Sized(Tokenizer):  # as many ids as the preset has, without training them
        def __len__(self):
            return PRESETS[preset].vocab

    tokenizer = Sized(("<asr>",))
    model = planted(PRESETS[preset], [tokenizer.first_byte + byte for byte in b"ab "])
    return model, lambda: Streamer(model, tokenizer, **options)


class Clock:
    """Adds up the time spent in parts of a model, by hooks."""

    def __init__(self, model):
        import stream
        self.seconds = dict.fromkeys(("features", "encoder", "label encoder", "joint"), 0.0)
        self.stream, self.log_mel, self.handles = stream, stream.log_mel, []
        stream.log_mel = self.timed("features", self.log_mel)
        parts = {"encoder": [model.encoder], "label encoder": [model.label_encoder],
                 "joint": [model.joint.encoder_proj, model.joint.label_proj, model.joint.output]}
        for name, modules in parts.items():
            for module in modules:
                self.handles.append(
                    module.register_forward_pre_hook(lambda *_: setattr(self, "began", now()))
                )
                self.handles.append(
                    module.register_forward_hook(lambda *_, name=name: self.add(name))
                )

    def timed(self, name, function):
        def run(*arguments):
            self.began = now()
            try:
                return function(*arguments)
            finally:
                self.add(name)
        return run

    def add(self, name):
        self.seconds[name] += now() - self.began

    def close(self):
        self.stream.log_mel = self.log_mel
        for handle in self.handles:
            handle.remove()


now = time.perf_counter


def stream_chunks(streamer, audio):
    """One chunk of audio per call, then the flush -> seconds of every call, and the words. The
    flush is a call of its own: added to the last chunk's, it was the 99th percentile of a short
    run."""
    step = streamer.chunk * 160 * streamer.model.config.subsampling
    words, times = [], []
    for start in range(0, len(audio) + 1, step):
        began = now()
        words += streamer.accept(audio[start:start + step])
        times.append(now() - began)
    began = now()
    words += streamer.flush()
    times.append(now() - began)
    return times, words


def speed_table(presets, seconds):
    from model import features
    print(
        f"{'preset':7}{'chunk':>8}{'RTF':>8}{'median':>10}{'p99':>10}{'labels/s':>10}"
        f"{'stream/offline':>16}"
        "   features  encoder  labels  joint  rest"
    )
    for preset, chunk in presets:
        model, new = planted_streamer(preset, chunk=chunk)
        audio = tones(0, seconds)
        stream_chunks(new(), audio[:5 * 16000])
        times, words = stream_chunks(new(), audio)
        clock = Clock(model)
        whole = sum(stream_chunks(new(), audio)[0])
        clock.close()
        mel = features(torch.from_numpy(audio[: 20 * 16000]), model.config)[
            None
        ]
        with torch.inference_mode():
            offline = statistics.median(
                timed(lambda: model.encoder(mel, chunk=chunk)) for _ in range(3)
            )
            chunks = statistics.median(
                timed(lambda: encoder_in_chunks(model, mel, chunk)) for _ in range(3)
            )
        n_labels = sum(len(word.text) + 1 for word in words)
        steps = sorted(1000 * t for t in times)
        shares = [100 * part / whole for part in clock.seconds.values()]
        print(
            f"{preset:7}{round(1000 * chunk * model.config.frame_s):5} ms"
            f"{sum(times) / seconds:8.4f}"
            f"{statistics.median(steps):7.2f} ms{steps[int(0.99 * len(steps))]:7.2f} ms"
            f"{n_labels / seconds:10.1f}"
            f"{chunks / offline:16.2f}"
            + "".join(
                f"{s:{w}.0f} %" for s, w in zip(shares + [100 - sum(shares)], (9, 7, 6, 5, 4))
            ),
            flush=True,
        )


def encoder_in_chunks(model, mel, chunk):
    state, step = model.encoder.initial_state(1, chunk), chunk * model.config.subsampling
    for start in range(0, mel.shape[1], step):
        _, state = model.encoder(mel[:, start:start + step], state=state)


def timed(function):
    wait_for_gpu()
    began = now()
    function()
    wait_for_gpu()
    return now() - began


def wait_for_gpu():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def many_streams(preset, count, seconds):
    """The streams of a server: stepped one after the other, and in one batch."""
    from stream import advance
    _, new = planted_streamer(preset)
    audio = [tones(100 * k, seconds, seed=k) for k in range(count)]
    began = now()
    alone = [spelled(stream_chunks(new(), one)[1]) for one in audio]
    one_by_one, began = now() - began, now()
    streamers, words = [new() for _ in audio], [[] for _ in audio]
    for start in range(0, len(audio[0]), 5120):
        for streamer, one in zip(streamers, audio):
            streamer.push(one[start:start + 5120])
        for mine, found in zip(words, advance(streamers)):
            mine += found
    for streamer in streamers:
        streamer.close()
    for mine, found in zip(words, advance(streamers)):
        mine += found
    batched = now() - began
    same = sum(spelled(mine) == other for mine, other in zip(words, alone))
    print(
        f"\n{count} streams of {seconds} s, {preset}: one by one "
        f"{count * seconds / one_by_one:.0f} s of audio per "
        f"second, in one batch {count * seconds / batched:.0f} ({one_by_one / batched:.1f} "
        f"times); the same words in "
        f"{same} of {count}"
    )


def spelled(words):
    return [(word.stream, word.text, word.delay_ms, word.end_s) for word in words]


def long_stream(preset, minutes):
    """Time per chunk and memory from one end to the other, the end beside a fresh stream that hears
    the same; then everything once more in other packets."""
    _, new = planted_streamer(preset)
    streamer, fresh, digest, memory, count = new(), new(), hashlib.sha256(), [], 0
    step = streamer.chunk * 160 * streamer.model.config.subsampling
    times, beside = [], []
    for audio in minutes_of_tones(minutes, step):
        times.append([])
        for start in range(0, len(audio), step):
            began = now()
            words = streamer.accept(audio[start:start + step])
            times[-1].append(now() - began)
            count += note(digest, words)
            if len(times) > minutes - 5:
                beside.append(timed(lambda: fresh.accept(audio[start:start + step])))
        memory.append(resident_mb())
    note(digest, streamer.flush())
    first, last = (1000 * statistics.median(sum(part, [])) for part in (times[:5], times[-5:]))
    other = 1000 * statistics.median(beside)
    print(
        f"\n{minutes} minutes, {preset}: {count} words\nmedian per chunk: {first:.3f} ms in the "
        f"first five minutes, "
        f"{last:.3f} ms in the last five ({100 * (last / first - 1):+.1f} %);\n    {other:.3f} "
        f"ms in a fresh stream "
        f"stepped in turn with it in the last five ({100 * (last / other - 1):+.1f} %)\n"
        f"memory: {memory[min(4, minutes - 1)]:.1f} MB after five minutes, {memory[-1]:.1f} MB "
        f"at the end",
        flush=True,
    )
    streamer, again = new(), hashlib.sha256()
    for audio in minutes_of_tones(minutes, 7001):
        for start in range(0, len(audio), 7001):
            note(again, streamer.accept(audio[start:start + 7001]))
    note(again, streamer.flush())
    print(
        f"in packets of 7001 samples: "
        f"{'the same words' if digest.digest() == again.digest() else 'OTHER WORDS'}"
    )


def rough_stream(preset, minutes):
    """A stream as it may come, in packets of any size: four seconds of every minute are silence,
    clipped, or garbage. Against a stream of the tones alone, are the words the same from the 20th
    second behind that on, and what of them before it; and does the memory stay?"""
    _, new = planted_streamer(preset)
    rng, rough, plain, memory = np.random.default_rng(0), new(), new(), []
    same, all_words, spoiled = 0, 0, 0
    for minute in range(minutes):
        audio = tones(60 * minute, 60, seed=1)
        heard, burst = audio.copy(), slice(10 * 16000, 14 * 16000)
        n = burst.stop - burst.start
        heard[burst] = [np.zeros(n), np.clip(50 * heard[burst], -1, 1), rng.uniform(-10, 10, n),
                        np.sign(rng.standard_normal(n)), np.full(n, 10.0)][minute % 5]
        words, start = [], 0
        while start < len(heard):
            size = int(rng.integers(0, 16000))
            words += rough.accept(heard[start:start + size])
            start += size
        wanted = plain.accept(audio)

        def between(words, begin, end):
            times = 1000 * (60 * minute + begin), 1000 * (60 * minute + end)
            return [word for word in spelled(words) if times[0] < word[2] <= times[1]]

        for begin, end in ((0, 10), (34, 59)):
            found, known = between(words, begin, end), between(wanted, begin, end)
            same, all_words = same + (found == known) * len(known), all_words + len(known)
        spoiled += between(words, 11, 14) != between(wanted, 11, 14)
        memory.append(resident_mb())
    print(
        f"\n{minutes} minutes of which a fifteenth is silence, clipped or garbage, in packets of 0 "
        f"to 1 s, {preset}:\n{same} of {all_words} words before that and from 20 s behind it on as "
        f"without (during it others in {spoiled} of {minutes} minutes)\nmemory: "
        f"{memory[min(4, minutes - 1)]:.1f} MB after five minutes, {memory[-1]:.1f} MB at the end",
        flush=True)


def minutes_of_tones(minutes, step):
    """A minute after the other, cut so that each but the last is a whole number of steps."""
    rest = np.zeros(0, np.float32)
    for minute in range(minutes):
        audio = np.concatenate([rest, tones(60 * minute, 60, seed=1)])
        used = len(audio) if minute == minutes - 1 else len(audio) // step * step
        rest = audio[used:]
        yield audio[:used]


def note(digest, words):
    for word in spelled(words):
        digest.update(repr(word).encode())
    return len(words)


def resident_mb():
    """Memory of this process now, or at its highest where /proc is not there."""
    try:
        return (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        )
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def stream(options):
    torch.set_num_threads(min(options.threads, os.cpu_count() or 1))
    print(machine())
    speed_table([("tiny", 8), ("small", 8), ("paper", 25)], options.seconds)
    many_streams("tiny", 16, 20)
    if options.minutes:
        long_stream("tiny", options.minutes)
        rough_stream("tiny", options.minutes)


# ---- loss: against copying the logits, log_softmax, whatever else is installed, and the unfused
# joint ----------------

def loss_peers():
    """name -> cost of (logits, targets int32, lengths int32) for the packages that happen to be
    installed."""
    peers = {}
    try:
        from torchaudio.functional import rnnt_loss as theirs
        peers["torchaudio"] = lambda x, y, t, u: theirs(x, y, t, u, blank=0)
    except ImportError:
        pass
    try:
        from warprnnt_numba import RNNTLossNumba
        peers["warprnnt_numba"] = lambda x, y, t, u: RNNTLossNumba(blank=0, reduction="mean")(
            x, y, t, u
        )
    except ImportError:
        pass
    return peers


def rounds(contenders, repeats, device):
    """-> seconds of each, the least of them, and those of the host on a GPU: medians over rounds in
    which all take turns, so that what disturbs one disturbs the others. The least is what they take
    where memory is at hand: a virtual machine may need seconds to fetch gigabytes that were freed a
    moment ago."""
    seconds, host = ({name: [] for name in contenders} for _ in range(2))
    for _ in range(repeats + 1):
        for name, function in contenders.items():
            elapsed, launch = cuda_timed(function) if device == "cuda" else (timed(function), 0.0)
            seconds[name].append(elapsed)
            host[name].append(launch)
    return tuple(
        {name: summary(each[1:] or each) for name, each in times.items()}
        for summary, times in (
            (statistics.median, seconds),
            (min, seconds),
            (statistics.median, host),
        )
    )


def cuda_timed(function, calls=20):
    """Seconds of a call by the GPU's clock, over calls back to back, and those that the host needed
    to launch one."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    host = timed(lambda: [function() for _ in range(calls)])
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls, host / calls


def peak_mb(function, device):
    """The highest memory while it runs, above that before: resident, or the GPU's."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before, highest, done = resident_mb(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.001):
            highest[0] = max(highest[0], resident_mb())
    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(0.0, highest[0] - before)


def loss_table(shape, repeats, device):
    from rnnt_loss import rnnt_loss
    B, T, U1, V = shape
    logits = torch.randn(shape, device=device, requires_grad=True)
    y, t, u = (
        torch.randint(1, V, (B, U1 - 1)).int(),
        torch.full((B,), T).int(),
        torch.full((B,), U1 - 1).int(),
    )
    there, buffer = [a.to(device) for a in (y, t, u)], torch.empty_like(logits).detach()

    def both_ways(loss):
        def run():
            loss(logits, *there).backward()
            logits.grad = None
        return run

    def cost_only():
        with torch.no_grad():
            rnnt_loss(logits, *there, blank=0)

    two, ones = torch.zeros(B, T, U1, 2, device=device, requires_grad=True), torch.ones_like(
        there[0]
    )
    contenders = {
        "copy": lambda: buffer.copy_(logits.detach()),
        "log_softmax": lambda: torch.log_softmax(logits.detach(), -1),
        "ours": both_ways(lambda *args: rnnt_loss(*args, blank=0)),
        "ours, cost only": cost_only,
        "ours, V = 2: the lattice": lambda: rnnt_loss(two, ones, *there[1:], blank=0).backward(),
    }
    contenders.update({name: both_ways(loss) for name, loss in loss_peers().items()})
    seconds, least, host = rounds(contenders, repeats, device)
    size = logits.numel() * 4 / 1e6
    for name, each in seconds.items():
        print(f"| {shape} {size:.0f} MB | {name} | {each * 1e3:.3g} | {least[name] * 1e3:.3g} | "
              f"{each / seconds['copy']:.2f} | {each / seconds['log_softmax']:.2f} | "
              f"{peak_mb(contenders[name], device) / size:.2f} |"
              + f" {host[name] * 1e6:.0f} us |" * (device == "cuda"), flush=True)


def joint_table(shape, width, repeats, device):
    from rnnt_loss import joint_rnnt_loss, rnnt_loss
    B, T, U1, V = shape
    inputs = [torch.randn(s, device=device).requires_grad_()
              for s in ((B, T, width), (B, U1, width), (V, width), (V,))]
    lengths = torch.randint(1, V, (B, U1 - 1)), torch.full((B,), T), torch.full((B,), U1 - 1)

    def unfused():
        hidden = torch.tanh(inputs[0][:, :, None] + inputs[1][:, None])
        rnnt_loss(torch.nn.functional.linear(hidden, *inputs[2:]), *lengths, blank=0).backward()

    def fused():
        joint_rnnt_loss(*inputs, *lengths, blank=0).backward()
    contenders = {"joint, then loss": unfused, "fused": fused}
    memory = {name: peak_mb(function, device) for name, function in reversed(contenders.items())}
    seconds, _, _ = rounds(contenders, repeats, device)
    for name, each in seconds.items():
        print(
            f"| {shape} width {width}, logits {B * T * U1 * V * 4 / 1e6:.0f} MB | {name} | "
            f"{each * 1e3:.3g} | "
            f"{each / seconds['joint, then loss']:.2f} | {memory[name]:.0f} MB |",
            flush=True,
        )


def loss(options):
    torch.set_num_threads(min(options.threads, os.cpu_count() or 1))
    print(machine())
    shapes = [(4, 150, 20, 1000), (8, 300, 40, 500), (16, 200, 50, 4000)][:options.shapes]
    # Memory that a virtual machine never gave is slow.
    np.ones(max(2 ** 29, 5 * max(map(math.prod, shapes))), np.float32)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(f"\n{device}, forward and backward\n"
              "| logits | what | ms | least | / copy | / log_softmax | memory / logits |"
              + " host, a call |" * (device == "cuda"))
        for shape in shapes:
            loss_table(shape, options.repeats, device)
        print("\n| joint | what | ms | / unfused | extra memory |")
        joint_table((16, 60, 20, 300), 256, options.repeats, device)
        if options.joint:
            joint_table((16, 200, 50, 4000), 512, 0 if device == "cpu" else options.repeats, device)


# ---- train ---------------------------------------------------------------------------------------

def training(options):
    """Phase by phase, medians: a batch in this thread; of a step, the encoder (forward and
    backward), the optimisers, and the rest, which is heads, label encoder, joint and loss. Further
    flags are train.py's."""
    import train
    chosen = train.parse_options(options.more)
    ranks, corpus = train.Ranks.here(chosen.device), train.open_corpus(chosen)[0]
    run = train.new_run(chosen, corpus)
    source, wanted = train.Source(chosen, run), train.requests(corpus, run, chosen, ranks)
    print(machine())
    print(f"{'phase':28}{'sound':>8}{'batch':>9}{'step':>9}{'encoder':>9}{'optimiser':>11}"
          f"{'rest':>9}{'s/s':>7}")
    half, start = chosen.warm_steps // 2, chosen.warm_steps + train.FORGET_STEPS
    for step in dict.fromkeys((0, half, min(start, chosen.steps - 1))):
        names = " ".join(train.tasks(step, chosen))
        easy = not chosen.augment or step < half
        each = [train_times(train, run, source, replace(next(wanted), easy=easy), chosen, ranks,
                            step) for _ in range(options.rounds + 2)][2:]  # the first ones compile
        sound, batch, whole, encoder, optimiser = map(statistics.median, zip(*each))
        print(f"{names[:27]:28}{sound:6.1f} s{1e3 * batch:6.0f} ms{1e3 * whole:6.0f} ms"
              f"{1e3 * encoder:6.0f} ms{1e3 * optimiser:8.0f} ms"
              f"{1e3 * (whole - encoder - optimiser):6.0f} ms{sound / whole:7.0f}", flush=True)


def train_times(train, run, source, request, chosen, ranks, step):
    """-> seconds of sound, and of making the batch, the step, its encoder, its optimisers."""
    began = now()
    batch = source[request]
    made, run.step = now() - began, step
    spent, steps = [], [optimizer.step for optimizer in run.optimizers]
    for optimizer, plain in zip(run.optimizers, steps):
        optimizer.step = lambda plain=plain: spent.append(timed(plain))
    whole = timed(lambda: train.train_step(run, [batch], chosen, ranks))
    for optimizer, plain in zip(run.optimizers, steps):
        optimizer.step = plain
    on_device = train.to_device(batch, chosen.device)

    def encoder():
        frames, _ = run.model.encoder(on_device.mel, on_device.mel_lengths)
        frames.sum().backward()
    alone = timed(encoder)
    run.model.zero_grad(set_to_none=True)
    return batch["mel_frames"] / 100, made, whole, alone, sum(spent)


# ---- tokenizer -----------------------------------------------------------------------------------

def tokenizer(options):
    from serialize import Tokenizer
    lines = []
    for path in options.files:
        try:
            opened = gzip.open if path.endswith(".gz") else open
            with opened(path, "rt", encoding="utf-8") as file:
                lines += file.read().splitlines()
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            sys.exit(f"bench.py: {path}: {error}")
    lines = [line for line in lines if line.strip()][:options.sentences]
    if not lines:
        sys.exit(f"bench.py: no sentence in {' '.join(options.files)}")
    print(machine())
    began = now()
    smallest = len(Tokenizer(["<asr>"]))                       # blank, the tag and the bytes
    trained = Tokenizer.train(lines, smallest + options.merges)
    print(f"{len(lines)} sentences, {len(trained) - smallest} merges: trained in "
          f"{now() - began:.1f} s")
    for what in ("first", "second"):  # a word is split once and remembered
        began, ids = now(), [trained.encode(line) for line in lines]
        seconds, words = now() - began, sum(len(line.split()) for line in lines)
        print(f"{what} pass: {words} words in {seconds:.2f} s, {words / seconds:.0f} words/s, "
              f"{sum(map(len, ids)) / words:.2f} tokens a word")


# ---- Command line --------------------------------------------------------------------------------

def make_parser():
    from figures import at_least
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("stream", help="chunks, real-time factors, an hour of audio")
    one.add_argument("--threads", type=at_least(1), default=1)
    one.add_argument("--seconds", type=at_least(1), default=20, help="of audio for each preset")
    one.add_argument("--minutes", type=at_least(0), default=60, help="of the long stream; 0: none")
    one.set_defaults(run=stream)
    two = commands.add_parser(
        "loss", help="rnnt_loss beside a copy, log_softmax and installed peers; the joint"
    )
    two.add_argument("--threads", type=at_least(1), default=2)
    two.add_argument("--repeats", type=at_least(1), default=9)
    two.add_argument(
        "--shapes", type=at_least(1), default=3,
        help="how many of the three shapes; the third needs 13 GB"
    )
    two.add_argument(
        "--joint", action="store_true", help="the large joint too: a minute or two, 8 GB"
    )
    two.set_defaults(run=loss)
    four = commands.add_parser("train", help="where a training step's time goes")
    four.add_argument("--rounds", type=at_least(1), default=8)
    four.set_defaults(run=training)
    three = commands.add_parser("tokenizer", help="byte-level BPE: training and encoding")
    three.add_argument("files", nargs="+", help="text, a sentence a line")
    three.add_argument("--sentences", type=at_least(1), default=30000)
    three.add_argument("--merges", type=at_least(0), default=4000)
    three.set_defaults(run=tokenizer)
    return parser


def main():
    parser = make_parser()
    options, options.more = parser.parse_known_args()
    if options.more and options.run is not training:
        parser.error(f"unknown: {' '.join(options.more)}")
    with told("bench.py"):
        options.run(options)


if __name__ == "__main__":
    main()
