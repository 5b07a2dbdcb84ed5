"""Small mutations over the six files, one line each as a rule: each must turn a test red.

    python tests/mutate.py            all of them, and what survives
    python tests/mutate.py 3 17       these alone
    python tests/mutate.py train.py   those of one file

Each mutation names the tests that hold it, and only these run, in a copy of the project. A mutation
that survives is a test that is missing.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# (file, what stands there, what it becomes, test file, pytest's -k)
MUTATIONS = [
    # The weights, labels and rows of training.
    ("train.py", 'return {"transducer": 1.0} | sides', 'return {"transducer": 0.0} | sides',
     "test_train.py", "weights_and_rates"),
    ("train.py", "next_label_scores(model, labels[:, :-1])",
     "next_label_scores(model, labels[:, 1:])", "test_train.py", "does_not_see_what_it_predicts"),
    ("train.py", "return max(options.label_dropout, left) if step",
     "return options.label_dropout if step", "test_train.py", "weights_and_rates"),
    ("train.py", "epoch, first = epoch + 1,", "epoch, first = epoch,",
     "test_train.py", "epoch_after_epoch"),
    ("model.py", "return log_mel(pad_samples(samples, config.subsampling),",
     "return 0 * log_mel(pad_samples(samples, config.subsampling),",
     "test_train.py", "hears_the_sound_of_its_manifest"),
    ("model.py", "self.dropout = nn.Dropout(dropout)\n\n    def forward(self, x, bias, chunk",
     "self.dropout = nn.Dropout(0.0)\n\n    def forward(self, x, bias, chunk",
     "test_model.py", "dropout_is"),
    ("model.py", "Block(config.dim, config.heads, ff, config.dropout, kernel)",
     "Block(config.dim, config.heads, ff, 0.0, kernel)", "test_model.py", "every_part_drops"),
    ("model.py", "self.dropout = nn.Dropout(config.dropout)\n        if config",
     "self.dropout = nn.Dropout(0.0)\n        if config", "test_model.py", "every_part_drops"),
    ("stream.py", "self.config.frames(self.received + self.tail)",
     "self.config.frames(self.received)", "test_stream.py", "the_tail_is"),
    ("train.py", 'counts["letters"] > 0)', "bool(run.letters))",
     "test_train.py", "steps_without_letters"),
    ("train.py", "time.monotonic() - saved > SAVE_EVERY", "False",
     "test_train.py", "a_crash_costs"),
    ("train.py", "    if learned:", "    if True:",
     "test_train.py", "not_finite_is_dropped"),
    ("stream.py", "model.config.chunks[0] if options.chunk is None else options.chunk",
     "model.config.chunks[0]", "test_stream.py", "test_eval"),
    ("stream.py", '"beam": options.beam', '"beam": 1', "test_stream.py", "test_eval"),
    ("train.py", "grad = self.with_momentum(p, group[\"momentum\"])", "grad = p.grad",
     "test_train.py", "muon"),
    ("train.py", "zip(p.chunk(group[\"parts\"]), grad.chunk(group[\"parts\"]))",
     "zip(p.chunk(1), grad.chunk(1))", "test_train.py", "muon"),
    ("train.py", "keep[frame:max(until + margin, frame + 1), label:after + 1] = True",
     "keep[frame:max(until, frame + 1), label:after + 1] = True",
     "test_train.py", "lattice_of_blocks"),
    ("train.py", "np.ceil(times / frame_s - 1e-6) - 1,", "np.ceil((times - 0.4) / frame_s) - 1,",
     "test_train.py", "restricted_lattice"),
    ("train.py", "if evaluates and ranks.agree(stop.wanted):", "if False:",
     "test_train.py", "amid_an_evaluation"),
    ("train.py", "if mode == \"st\" else row.asr", "if mode == \"asr\" else row.asr",
     "test_train.py", "learned_as_that_text"),
    ("train.py", "weak[:, :rng.integers(30, 70)] = False", "weak[:, rng.integers(30, 70):] = False",
     "test_train.py", "codec"),
    ("train.py", "         **saved_search(options),\n         step=run.step)",
     "         step=run.step)", "test_train.py", "saved_with"),
    ("train.py", "tags=run.streams,\n                        **saved_search(options))",
     "tags=run.streams)", "test_train.py", "saved_with"),
    ("train.py", 'int(generator(*shared, "chunk").choice(model.config.chunks))',
     "model.config.chunks[0]", "test_train.py", "every_chunk_size"),
    ("train.py", "fastemit_lambda=options.fastemit, delay", "delay",
     "test_train.py", "fastemit"),
    ("train.py", ", delay_penalty=options.delay_penalty)", ")",
     "test_train.py", "own_logits"),
    ("train.py", "(next(ends[tag]) or 0) / s.speed", "(next(ends[tag]) or 0) * s.speed",
     "test_train.py", "another_speed"),
    ("train.py", 'f"{float(total) / self.counts[name]:.5g}"', 'f"{float(total):.5g}"',
     "test_train.py", "log_has_means"),
    ("train.py", "key = row.audio, row.start, row.duration", "key = row.audio",
     "test_train.py", "own_piece"),
    ("train.py", "self.rows(0, n, test=True)", "self.rows(0, n)",
     "test_train.py", "unseen_utterances"),
    ("train.py", "rng.random() < 0.5:\n        background = coloured",
     "rng.random() < 0.0:\n        background = coloured", "test_train.py", "half_of_what"),
    ("train.py", "** (-rng.uniform(0, 2) / 2)", "** (rng.uniform(0, 2) / 2)",
     "test_train.py", "half_of_what"),
    ("train.py", "rng.random() < BEFORE else 0", "rng.random() < 0 else 0",
     "test_train.py", "how_often"),
    ("train.py", "mel = without_bands(through_codec(mel, rng, floor), rng, floor)", "pass",
     "test_train.py", "codecs_and"),
    ("train.py", "rng.random() < VOICES", "rng.random() < 0", "test_train.py", "how_often"),
    ("train.py", "    if lacking:\n        threads", "    if not lacking:\n        threads",
     "test_train.py", "links_are_learned"),
    ("train.py", "seconds + more > options.max_seconds", "seconds + more > math.inf",
     "test_train.py", "joining_stops"),
    ("train.py", "return bool(self.add(torch.tensor(float(wish), device=self.device)))",
     "return wish", "test_train.py", "wish_of"),
    # The loss.
    ("rnnt_loss.py", "ways.append(alpha[t - 1, u] + logp[t - 1, u, blank])",
     "ways.append(alpha[t - 1, u] + logp[t, u, blank])", "test_rnnt_loss.py", "enumeration"),
    ("rnnt_loss.py", "posteriors[t, u, LABEL] *= posteriors[t, u + 1].sum()",
     "posteriors[t, u, LABEL] *= posteriors[t, u].sum()", "test_rnnt_loss.py", "plain_numpy"),
    ("rnnt_loss.py", "by_label = old[u - 1] + arcs[t, u - 1, LABEL] if u",
     "by_label = old[u - 1] + arcs[t, u, LABEL] if u", "test_rnnt_loss.py", "enumeration"),
    ("rnnt_loss.py", "arcs[..., LABEL] *= 1 + batch.fastemit", "arcs[..., LABEL] *= 1",
     "test_rnnt_loss.py", "fastemit"),
    ("rnnt_loss.py", "return inside & keep.cpu()", "return inside",
     "test_rnnt_loss.py", "pruned_is_the_sum"),
    ("rnnt_loss.py", "    first = torch.minimum(first, rise)", "    first = first + 0 * rise",
     "test_rnnt_loss.py", "bands_are_legal"),
    ("rnnt_loss.py", "bad_T = (logit_lengths < 1)", "bad_T = (logit_lengths < 0)",
     "test_rnnt_loss.py", "what_is_no_length or errors_show"),
    ("rnnt_loss.py", "lost = sums < am", "lost = sums < 0 * am",
     "test_rnnt_loss.py", "underflows"),
    # The network.
    ("model.py", "(chunks_back < 0) | (chunks_back > left)", "chunks_back > left",
     "test_model.py", "what_a_frame_depends_on"),
    ("model.py", "(chunks_back < 0) | (chunks_back > left)", "chunks_back < 0",
     "test_model.py", "what_a_frame_depends_on"),
    ("model.py", "inputs = inputs.masked_fill(~real, 0)", "inputs = inputs.masked_fill(~real, 1)",
     "test_model.py", "batch_is_single"),
    # Links.
    ("align.py", "hmm_sentence(emission, null, jump, found, jump_counts[s])",
     "ibm1_sentence(emission, null, diagonal, found)", "test_align.py", "either_direction"),
    ("align.py", "state[j + 1, 0] = state[j, 0] * null[j]", "state[j + 1, 0] = state[j, 0]",
     "test_align.py", "sum_over_all_paths"),
    ("align.py", "for end in own if count[end] == 1", "for end in own if count[end]",
     "test_align.py", "textgrid"),
    ("align.py", "len(a) and int(match[3])", "len(a) + 1 and int(match[3])",
     "test_align.py", "gold_links"),
    # One stream out of two texts.
    ("serialize.py", "latest[j] = max(latest[j], i)", "latest[j] = i",
     "test_serialize.py", "test_align"),
    ("serialize.py", "return list(accumulate(latest, max))", "return latest",
     "test_serialize.py", "words_without_links"),
    ("serialize.py", "if most < 2:", "if most < 1:",
     "test_serialize.py", "byte_pair or example_in_the_documentation"),
    ("serialize.py", "finished = self.flush()\n", "finished = []\n",
     "test_serialize.py", "a_tag_ends_the_word"),
    # Streaming and its scores.
    ("stream.py", "select([b + B * (token != BLANK)", "select([b + B",
     "test_stream.py", "batch or training_score"),
    ("stream.py", "delay_ms = min(last_sample, self.received) / PER_MS",
     "delay_ms = self.received / PER_MS", "test_stream.py", "delayed_by or packets"),
    ("stream.py", "return lag(n_ref), lag(max(len(delays), n_ref))",
     "return lag(n_ref), lag(n_ref)", "test_stream.py", "latency"),
    ("stream.py", "row[1:] = np.minimum(row[1:], cost[:-1] + (codes != number[item]))",
     "row[1:] = np.minimum(row[1:], cost[:-1] + 1)", "test_stream.py", "edit_distance"),
    ("stream.py", "read_audio(row.audio, row.start, row.duration)", "read_audio(row.audio)",
     "test_audio.py", "piece_of"),
    ("stream.py", "min(tokens[0].frame * frame_s", "min(tokens[-1].frame * frame_s",
     "test_stream.py", "how_sure"),
    ("stream.py", "sum(t.log_prob for t in tokens) / len(tokens)",
     "sum(t.log_prob for t in tokens)", "test_stream.py", "how_sure"),
    ("stream.py", "until_stopped(), tags=tags, batch_size=1,",
     "until_stopped(), tags=tags, batch_size=16,",
     "test_stream.py", "as_it_is_told"),
    ("align.py", "            yield from batch_times(model, tokenizer, serialize, ready, tail)\n"
     "            ready", "            ready", "test_align.py", "by_a_checkpoint"),
    ("stream.py", "elif event.stream == self.tag:", "else:", "test_stream.py", "track"),
    ("stream.py", 'text.replace(",", ".") if self.webvtt else text', "text",
     "test_stream.py", "webvtt"),
    ("stream.py", "max(self.words[0].start_s, self.free_s)", "self.words[0].start_s",
     "test_stream.py", "no_cue_begins or no_cue_overlaps"),
    ("stream.py", '("cer", join)', '("cer", list)', "test_stream.py", "characters"),
    ("stream.py", "streamer.due() is not None or not streamer.closed", "False",
     "test_stream.py", "babbles"),
    ("stream.py", "Streamer(model, tokenizer, pause=options.pause, **search)",
     "Streamer(model, tokenizer, **search)", "test_stream.py", "caption_pauses"),
    ("stream.py", "self.done - since >= self.hold", "self.done < 0", "test_stream.py", "held_it"),
    ("align.py", "found or [(len(asr) - 1, 0)]", "found or [(0, 0)]",
     "test_align.py", "small_things"),
    ("train.py", "if s.rows[-1].audio:   ", "if False:   ", "test_train.py",
     "recorded_speech_ends"),
    ("stream.py", "self.began = now\n", "pass\n", "test_stream.py", "waiting_for_another"),
    ("serialize.py", "abs(one_s - other_s) < 0.05", "abs(one_s - other_s) < 5",
     "test_serialize.py", "only_rounded"),
    # What a reader of the code and the tests found that nobody held.
    ("train.py", "same.sort(key=lambda k: rows[k].start)", "pass",
     "test_train.py", "one_file_are_joined"),
    ("train.py", "max(0, first - len(batches))", "0", "test_train.py", "epoch_after"),
    ("train.py", "for row in rows[::max(1, len(rows) // 300)]:", "for row in rows[:300]:",
     "test_train.py", "new_network"),
    ("train.py", "for text in (row.asr, *row.st.values()) if text]",
     "for text in (row.asr,) if text]",
     "test_train.py", "new_network"),
    ("train.py", "chance=torch.from_numpy(rng.random(len(targets), np.float32))",
     "chance=torch.ones(len(targets))", "test_train.py", "even_chances"),
    ("serialize.py", "seconds.append(max(0.0, s))", "seconds.append(s)",
     "test_serialize.py", "delays_by"),
    ("stream.py", "pool = [(hyp.score - self.blank_penalty,",
     "pool = [(hyp.score + self.blank_penalty,",
     "test_stream.py", "reach_the_beam"),
    ("stream.py", "self.quiet += length", "self.quiet = length",
     "test_stream.py", "how_long_it_was_quiet"),
    ("stream.py", "(options.vtt, True)) if path", "(options.vtt, False)) if path",
     "test_stream.py", "vtt_is_webvtt"),
    ("train.py", "sum(weights[task] * loss / max(1, counts[task])",
     "sum(loss / max(1, counts[task])",
     "test_train.py", "weighs_its_tasks"),
    ("train.py", "kept = dict(strict=options.strict, allow_outside=options.allow_outside)",
     "kept = dict(strict=options.strict, allow_outside=False)",
     "test_train.py", "outside_the_folder"),
    ("train.py", 'beside.get("tokenizer") == tokenizer.to_dict()',
     'beside.get("tokenizer") == tokenizer',
     "test_train.py", "same_tokens"),
    ("stream.py", "at < end - rate // 20", "at < end", "test_audio.py", "rounded_by"),
    ("align.py", "Recipe(method=options.method or Recipe.method)", "Recipe()",
     "test_align.py", "method_is"),
    ("train.py", "np.mean(chrf) > run.best", "max(chrf) > run.best",
     "test_train.py", "best_is_so"),
    ("train.py", "            if options.strict:\n                raise InputError(message) from",
     "            if False:\n                raise InputError(message) from",
     "test_train.py", "strict_is_about"),
    ("train.py", "dropout = model.config.dropout if options.dropout is None else options.dropout",
     "dropout = model.config.dropout", "test_train.py", "goes_on_with_the"),
    ("train.py", "torch.nn.init.zeros_(model.joint.label_proj.weight)", "pass",
     "test_train.py", "new_joint"),
    ("train.py", "augment=0.2, eval_every=2000)", "augment=1.0, eval_every=2000)",
     "test_train.py", "defaults_for_real"),
    ("train.py", "np.float32(min(10 ** rng.uniform(-1, 0.5), 1 / peak))",
     "np.float32(min(1.0, 1 / peak))",
     "test_train.py", "20_db_softer"),
    ("stream.py", "first = round(start * rate) if promised is None else min(round(start * rate),",
     "first = round(start * SAMPLE_RATE) if promised is None else min(round(start * SAMPLE_RATE),",
     "test_audio.py", "begins_at_its_second"),
    ("stream.py", "(written[-1].frame if written else self.shown_at)",
     "(written[-1].frame if written else -1)", "test_stream.py", "since_the_last_token"),
    ("stream.py", "[self.done] * (len(tokens) - same)", "[0] * (len(tokens) - same)",
     "test_stream.py", "came_to_stay"),
    ("stream.py", "cutoff = 0.95 * min(", "cutoff = 0.8 * min(", "test_audio.py", "just_below"),
    ("stream.py", 'end -= int.from_bytes(footer[12:16], "little")',
     'end -= int.from_bytes(footer[12:16], "big")', "test_audio.py", "ape_tag_is_no"),
    ("stream.py", "fits = max(len(join(longer)), columns(join(longer))) <= self.WIDTH",
     "fits = len(join(longer)) <= self.WIDTH", "test_stream.py", "wide_characters_has"),
    ("stream.py", "load_run(options.checkpoint, options.device)", "load_run(options.checkpoint)",
     "test_audio.py", "where_it_is_told"),
    ("stream.py", "opened_tracks(planned, options.pause)", "opened_tracks(planned, 1.0)",
     "test_stream.py", "cues_pause"),
    ("stream.py", "read_manifest(options.eval, allow_outside=options.allow_outside,",
     "read_manifest(options.eval, allow_outside=True,", "test_stream.py", "stays_in_its_folder"),
    ("align.py", "aer(links[:len(sure)], sure, possible)", "aer(links[:len(sure)], possible, sure)",
     "test_align.py", "sure_from_possible"),
    ("align.py", "if word.lower() not in SILENCES]", "if word not in SILENCES]",
     "test_align.py", "silence_in_a_ctm"),
    ("align.py", "if i not in sources and j not in targets:",
     "if i not in sources or j not in targets:", "test_align.py", "last_step_of_grow"),
    ("stream.py", "if clipped > 0.1 * n:", "if clipped > 0.5 * n:", "test_audio.py", "a_tenth_at"),
    ("rnnt_loss.py", "return costs.sum() * batch.factor if batch.factor else costs, posteriors",
     "return costs.sum() if batch.factor else costs, posteriors",
     "test_rnnt_loss.py", "reduced_as_the_others"),
    ("serialize.py", "return len(usable), [rate,", "return len(usable), [1 / rate,",
     "test_serialize.py", "tokens_a_second"),
    ("train.py", "run.model.train(), options.device", "run.model.eval(), options.device",
     "test_train.py", "whatever_mode"),
    ("train.py", "blank=0, reduction=\"sum\", keep=keep,",
     "blank=0, reduction=\"sum\", keep=batch.keep,", "test_train.py", "so_many_rows"),
    ("train.py", "with locked(folder, ranks.first):", "with locked(folder, True):",
     "test_train.py", "two_processes_make"),
    ("train.py", "0 if learned else self.in_a_row + 1", "self.in_a_row + (not learned)",
     "test_train.py", "now_and_then"),
    ("train.py", "step = begun + count // (ranks.world * options.accumulate)",
     "step = begun + count", "test_train.py", "however_a_step"),
    ("train.py", "track[:, [0, 1, 2, 5, 6]] *= speaker.tract", "track[:, [0]] *= speaker.tract",
     "test_train.py", "scales_all"),
    ("train.py", "    if rng.random() < 0.15:", "    if rng.random() < 0:",
     "test_train.py", "there_is_a_telephone"),
    ("stream.py", "row.get(name, {}).get(tag, 0)", "row.get(name, {}).get(name, 0)",
     "test_stream.py", "malformed_output"),
    # The tools whose numbers the tables state.
    ("tests/reproduce.py", 'how = own_search(beside) | {"tags"', 'how = {"tags"',
     "test_reproduce.py", "searched_as"),
    ("tests/reproduce.py", "/ 10 ** (ratio_db / 10))", "/ 10 ** (ratio_db / 20))",
     "test_reproduce.py", "has_the_ratio"),
    ("tests/reproduce.py", '("noise", in_noise))', '("noise", items))',
     "test_reproduce.py", "heard_in_noise"),
    ("tests/reproduce.py", '"--seed", str(seed), *more])', '"--seed", "0", *more])',
     "test_reproduce.py", "in_their_order"),
    ("tests/long_streams.py", "in (alone[tag], joined[tag]):", "in (joined[tag], alone[tag]):",
     "test_stream.py", "stand_under"),
    # Found by reading, 2026-11-28.
    ("serialize.py", "if links and lang not in row.st_times:", "if links:",
     "test_serialize.py", "projected_times_are"),
    ("serialize.py", '"folder": options.folder or ""', '"folder": ""',
     "test_serialize.py", "any_table"),
    ("align.py", "if ready and longest * (len(ready) + 1) > BATCH_SAMPLES:", "if False:",
     "test_align.py", "times_by_a_checkpoint"),
    ("align.py", "enumerate(forward.T) if p.max(initial=0) > 1 - p.sum()}",
     "enumerate(forward.T) if p.max(initial=0) > 0}", "test_align.py", "more_likely_of_null"),
    ("rnnt_loss.py", "tile_bytes // ((2 * V + 4 * J) * dtype.itemsize)", "tile_bytes",
     "test_rnnt_loss.py", "only_nodes_kept"),
    ("model.py", "os.fsync(file.fileno())", "pass", "test_model.py", "on_the_disk_before"),
    ("stream.py", "return id(streamer.model), type(streamer.search),",
     "return type(streamer.search),", "test_stream.py", "two_models"),
    ("stream.py", "round(value, 4) if isinstance(value, float)",
     "round(value) if isinstance(value, float)", "test_stream.py", "json_keeps"),
    ("stream.py", 'ascii_only = "utf" not in (sys.stdout.encoding or "").lower()',
     "ascii_only = False", "test_stream.py", "json_keeps"),
    ("stream.py", "self.file.flush()\n        except OSError", "pass\n        except OSError",
     "test_stream.py", "as_soon_as_the_next"),
    ("stream.py", "written._replace(frame=max(written.frame, self.shown_at))", "written",
     "test_stream.py", "best_hypothesis_has_held"),
    ("stream.py", "self.leader[n:], self.held_since[n:]", "self.leader[n:], self.held_since",
     "test_stream.py", "best_hypothesis_has_held"),
    ("stream.py", "for text in pieces(printable(word.text), self.WIDTH):",
     "for text in [printable(word.text)]:", "test_stream.py", "wider_than_a_line"),
    ("train.py", "some = rows[::-(-len(rows) // BPE_ROWS)]", "some = rows[:BPE_ROWS]",
     "test_train.py", "tokenizer_learns_from"),
    ("train.py", "given[name] = os.path.abspath(given[name])", "pass",
     "test_train.py", "wherever_one_stands"),
    ("train.py", "return symbols if len(symbols) + repeats <= n_frames else []",
     "return symbols", "test_train.py", "ctc_cannot_fit"),
    ("train.py", "self.options.seed, request.epoch, s.rows[0].id",
     "self.options.seed, s.rows[0].id", "test_train.py", "another_way_in_every_epoch"),
    ("train.py", "next_label_scores(model, labels)[..., classes]",
     "next_label_scores(model, labels)[..., classes].detach()",
     "test_train.py", "simple_task_is_the_loss"),
    ("train.py", "                    saved = time.monotonic()", "                    pass",
     "test_train.py", "every_ten_minutes"),
    ("train.py", '"words": count("words")', '"words": count("targets")',
     "test_train.py", "counts_its_own_symbols"),
    ("train.py", "if augmented and chosen[0].audio else 1.0", "if augmented else 1.0",
     "test_train.py", "keeps_its_speed"),
    ("train.py", "min(40, n_frames // 8)", "min(40, n_frames)",
     "test_train.py", "stretches_of_a_short"),
    ("train.py", "rng.uniform(7, 30)", "rng.uniform(7, 15)", "test_train.py", "7_to_30_db"),
    ("train.py", "rng.integers(30, 70)", "rng.integers(30, 35)", "test_train.py", "from_band_30"),
    ("train.py", "torch.manual_seed(options.seed)", "torch.manual_seed(0)",
     "test_train.py", "another_seed_is"),
    ("rnnt_loss.py", "dtype=sum_dtype, device=a.device", "dtype=a.dtype, device=a.device",
     "test_rnnt_loss.py", "adds_up_in_float32"),
    ("rnnt_loss.py", "mass -= 1e-4 / U1 * (centre", "mass -= 0 * (centre",
     "test_rnnt_loss.py", "lies_around_its_path"),
    ("rnnt_loss.py", "first.flip(1).cummin(1).values.flip(1)", "first.cummax(1).values",
     "test_rnnt_loss.py", "band_of_the_comments"),
    ("rnnt_loss.py", "np.int32(high if high >= 0 else low)", "np.int32(high)",
     "test_rnnt_loss.py", "all_negative"),
    ("align.py", "longest = max([len(samples), *(len(earlier) for _, earlier, _, _ in ready)])",
     "longest = len(samples)", "test_align.py", "short_rows_behind"),
    ("align.py", "backward.expected_counts(forward if agree else None)",
     "backward.expected_counts(None)", "test_align.py", "teaches_the_other"),
    ("model.py", "x + self.dropout(self.out(seen.transpose(1, 2).reshape(B, Q, D)))",
     "x + self.out(seen.transpose(1, 2).reshape(B, Q, D))", "test_model.py", "its_three_parts"),
    ("stream.py", "if not self.parser.pending:", "if False:",
     "test_stream.py", "its_own_tokens"),
    ("stream.py", "if sys.stdout.isatty() and not options.json:", "if False:",
     "test_stream.py", "lines_that_grow"),
    ("stream.py", "bool(spelled or self.speller.pending)", "bool(self.speller.pending)",
     "test_stream.py", "pause_follows_whole"),
    ("stream.py", "        self.paused = False\n\n    def start_s(self):",
     "        pass\n\n    def start_s(self):", "test_stream.py", "where_a_cue_ends"),
    ("stream.py", "Written(label, self.done + self.at, label_score)",
     "Written(label, self.done + self.at, blank_score)",
     "test_stream.py", "greedy_token_has"),
    ("stream.py", "labels.flatten()[index].tolist())", "scores.tolist())",
     "test_stream.py", "token_of_a_beam"),
    ("stream.py", "likelier = max(twin, hyp,", "likelier = min(twin, hyp,",
     "test_stream.py", "two_paths_meet"),
    ("stream.py", "BLEU(tokenize=tokenize)", "BLEU(tokenize=tokenize, lowercase=True)",
     "test_stream.py", "sees_capitals"),
    ("stream.py", 'rows = [row for row in records if tag in row["references"]]',
     "rows = records", "test_stream.py", "rows_with_its_text"),
    ("stream.py", '"invalid": dict(streamer.speller.invalid), "cut": dict(streamer.speller.cut)',
     '"invalid": {}, "cut": {}', "test_stream.py", "what_was_malformed"),
    ("stream.py", 'sys.stdout.reconfigure(errors="replace")',
     'sys.stdout.reconfigure(errors="strict")', "test_stream.py", "screen_lacks"),
    ("stream.py", "LIMITS = (20, 500)", "LIMITS = (20, 100)",
     "test_stream.py", "caps_are_counted"),
    ("stream.py", "peaks >= 0.999", "peaks >= 1.0", "test_audio.py", "ends_at_32767"),
    ("stream.py", "(1152 if version == 3 else 576)", "576", "test_audio.py", "known_by_its_frames"),
    ("stream.py", "(4000, 200_000), 64", "(4000, 48_000), 64",
     "test_audio.py", "any_usual_rate"),
    ("serialize.py", "both and all(row.links.get(lang)", "both and any(row.links.get(lang)",
     "test_serialize.py", "links_of_every_text"),
]


def killed(mutation, folder, green={}):
    """-> whether the named tests are red with this mutation and green without it (None: they are
    not, or cannot be run), and pytest's last line. `green` remembers what was run without."""
    file, right, wrong, tests, chosen = mutation
    if (tests, chosen) not in green:
        green[tests, chosen] = red((file, "", "", tests, chosen), folder)
    if green[tests, chosen][0] is not False:
        return None, f"red without the mutation: {green[tests, chosen][1]}"
    return red(mutation, folder)


def red(mutation, folder):
    """-> whether the tests are red where `wrong` stands for `right`, "" for "" being no change."""
    file, right, wrong, tests, chosen = mutation
    source = (ROOT / file).read_text(encoding="utf-8")
    if right and source.count(right) != 1:
        return None, f"{right!r} stands {source.count(right)} times in {file}"
    changed = source.replace(right, wrong) if right else source
    (folder / file).write_text(changed, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               str(folder / "tests" / tests), "-k", chosen]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
        last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
        if done.returncode not in (0, 1):              # no test chosen, or pytest itself failed
            return None, last
        return done.returncode == 1, last
    except subprocess.TimeoutExpired:
        return True, "hung"
    finally:
        (folder / file).write_text(source, encoding="utf-8")


def main(argv):
    numbered = list(enumerate(MUTATIONS, 1))
    known = {str(n) for n, _ in numbered} | {mutation[0] for _, mutation in numbered}
    if unknown := set(argv) - known:
        print(f"mutate.py: neither a number from 1 to {len(numbered)} nor a file that is mutated: "
              f"{' '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if argv:
        numbered = [(n, m) for n, m in numbered if str(n) in argv or m[0] in argv]
    survived, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("runs", ".git", "__pycache__"))
        shared = ROOT.parent / "shared"
        if shared.exists():
            os.symlink(shared, Path(temporary) / "shared")
        for n, mutation in numbered:
            dead, last = killed(mutation, folder)
            state = {True: "killed", False: "SURVIVED", None: "BROKEN"}[dead]
            survived += [] if dead else [n]
            print(f"{n:3} {state:9} {mutation[0]:14} {mutation[2][:56]!r:60} {last}", flush=True)
    print(f"{len(numbered) - len(survived)} of {len(numbered)} killed in "
          f"{(time.perf_counter() - began) / 60:.1f} minutes; survived: {survived or 'none'}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
