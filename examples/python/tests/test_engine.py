"""Models, sessions and sequences; TENON_MODEL names the example checkpoint."""

import gc
import json
import os
import pathlib
import threading
import unittest

import numpy as np

import tenon

DIRECTORY = os.environ["TENON_MODEL"]
PROMPT = b"She was"


class EngineTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model = tenon.Model.load(DIRECTORY)

    @classmethod
    def tearDownClass(cls):
        cls.model.close()

    def test_info(self):
        config = json.loads((pathlib.Path(DIRECTORY) / "config.json").read_text())
        info = self.model.info
        for field in (
            "vocab_size",
            "hidden_size",
            "num_experts",
            "num_experts_per_tok",
        ):
            self.assertEqual(getattr(info, field), config[field], field)
        self.assertEqual(info.num_layers, config["num_hidden_layers"])

    def test_generate_is_a_decode_loop(self):
        with self.model.session(max_sequences=2) as session:
            tokens = list(session.generate(PROMPT, 16))
            self.assertEqual(len(tokens), 16)
            with session.sequence() as sequence:
                result = session.step(
                    [tenon.StepRow(sequence, PROMPT, tenon.SamplingParams.greedy())]
                )
                mine = [result.tokens[0]]
                while len(mine) < 16:
                    row = tenon.StepRow(
                        sequence, mine[-1], tenon.SamplingParams.greedy()
                    )
                    mine.append(session.step([row]).tokens[0])
                self.assertEqual(len(sequence), len(PROMPT) + 15)
            self.assertEqual(mine, tokens)
            self.assertEqual(session.info.num_sequences, 0)

    def test_measured_kernel_sizes(self):
        kernels = json.dumps(
            {"format": "tenon-moe-kernels-1", "device": "any", "source": "a test"}
        )
        with tenon.Context(moe_kernels=kernels) as context:
            self.assertEqual(context.info.num_moe_kernels, 0)
        with self.model.session(moe_kernels=kernels) as session:
            tokens = list(session.generate(PROMPT, 4))
        with self.model.session() as session:
            self.assertEqual(tokens, list(session.generate(PROMPT, 4)))
        for make in (tenon.Context, self.model.session):
            with self.assertRaisesRegex(tenon.TenonError, "format is missing"):
                make(moe_kernels="{}")

    def test_prompts_longer_than_a_step(self):
        prompt = list(PROMPT * 20)
        texts = []
        for max_tokens in (512, 16, 140, 139):
            with self.model.session(max_sequences=1, max_tokens=max_tokens) as session:
                sampling = tenon.SamplingParams(temperature=0.8, seed=7)
                texts.append(list(session.generate(prompt, 12, sampling)))
        self.assertEqual(texts[1:], texts[:1] * 3)

    def test_generate_ends_at_stop_and_at_the_context(self):
        with self.model.session(max_sequences=1, max_context=16) as session:
            tokens = list(session.generate(PROMPT, 1000, stop=()))
            self.assertEqual(len(tokens), 16 - len(PROMPT) + 1)
            stopped = list(session.generate(PROMPT, 1000, stop=[tokens[3]]))
            self.assertEqual(stopped, tokens[: tokens.index(tokens[3])])
            with self.assertRaises(tenon.TenonError) as raised:
                list(session.generate(PROMPT * 5, 1))
            self.assertEqual(raised.exception.code, tenon.RESOURCE_EXHAUSTED)
            self.assertEqual(session.info.num_sequences, 0)

    def test_rows_of_a_step(self):
        with self.model.session(count_experts=True, max_logit_rows=16) as session:
            a, b, c = (session.sequence() for _ in range(3))
            greedy = tenon.SamplingParams.greedy()
            result = session.step(
                [
                    tenon.StepRow(a, PROMPT, greedy, tenon.LOGITS_LAST),
                    tenon.StepRow(
                        b, np.frombuffer(PROMPT, np.uint8), greedy, tenon.LOGITS_ALL
                    ),
                    tenon.StepRow(c, PROMPT[:3]),
                ]
            )
            last, every = (np.asarray(m) for m in result.logits[:2])
            vocab = self.model.info.vocab_size
            self.assertEqual(
                (last.shape, every.shape), ((vocab,), (len(PROMPT), vocab))
            )
            np.testing.assert_array_equal(last, every[-1])
            self.assertEqual(result.tokens, [last.argmax(), last.argmax(), -1])
            self.assertEqual(result.logprobs[0], result.logprobs[1])
            self.assertIsNone(result.logits[2])
            self.assertEqual(len(result.distinct_experts), self.model.info.num_layers)
            self.assertGreater(result.microseconds, 0)
            self.assertEqual(session.info.num_tokens, 2 * len(PROMPT) + 3)

    def draw(self, session, sampling, **fields):
        """The token after the prompt, and the best ones. Beside another row,
        whose token must not change."""
        greedy = tenon.SamplingParams.greedy()
        with session.sequence() as sequence, session.sequence() as other:
            rows = [
                tenon.StepRow(other, PROMPT, greedy),
                tenon.StepRow(sequence, PROMPT, sampling, **fields),
            ]
            result = session.step(rows)
        self.assertEqual(result.statuses, [tenon.SAMPLE_OK] * 2)
        self.assertEqual(result.top[0], [])
        if not hasattr(self, "plain"):
            self.plain = result.tokens[0]
        self.assertEqual(result.tokens[0], self.plain)
        return result.tokens[1], result.top[1]

    def test_edits_bitmasks_and_best_tokens(self):
        options = {"max_logit_edits": 5, "logit_bitmasks": True, "max_top_logprobs": 3}
        with self.model.session(**options) as session:
            info = session.info
            self.assertEqual((info.max_logit_edits, info.max_top_logprobs), (5, 3))
            self.assertTrue(info.flags & tenon.SESSION_LOGIT_BITMASKS)
            sampling = tenon.SamplingParams(0, num_top_logprobs=3)
            token, top = self.draw(session, sampling)
            best, second, third = (t for t, _ in top)
            self.assertEqual(token, best)
            with session.sequence() as sequence:
                row = tenon.StepRow(
                    sequence, PROMPT, tenon.SamplingParams(), tenon.LOGITS_LAST
                )
                logits = np.asarray(session.step([row]).logits[0]).astype(np.float64)
            order = np.argsort(-logits, kind="stable")
            self.assertEqual([best, second, third], order[:3].tolist())
            logprobs = logits - logits.max()
            logprobs -= np.log(np.exp(logprobs).sum())
            np.testing.assert_allclose(
                [p for _, p in top], logprobs[order[:3]], atol=1e-4
            )

            # In whichever order they are given.
            bans = [tenon.LogitEdit(t, tenon.EDIT_BAN) for t in (best, second)]
            last = int(order[-1])
            for edits in (bans, bans[::-1], iter(bans)):
                token, top = self.draw(session, sampling, edits=edits)
                self.assertEqual([token, top[0][0]], [third, third])
            edits = [*bans, tenon.LogitEdit(last, bias=100)]
            self.assertEqual(self.draw(session, sampling, edits=edits)[0], last)
            edits = [tenon.LogitEdit(best, 1)]  # once in the output
            sampling.presence_penalty = 100
            self.assertEqual(self.draw(session, sampling, edits=edits)[0], second)
            self.assertEqual(self.draw(session, sampling, edits=())[0], best)
            with self.assertRaisesRegex(tenon.TenonError, "need edits"):
                self.draw(session, sampling)
            sampling.presence_penalty = 0

            bitmask = np.zeros((self.model.info.vocab_size + 31) // 32, np.int32)
            allowed = sorted((second, last), key=order.tolist().index)
            for t in allowed:
                bitmask.view(np.uint32)[t // 32] |= np.uint32(1 << t % 32)
            for mask in (bitmask, bitmask.view(np.uint32), tenon.Tensor(bitmask)):
                token, top = self.draw(session, sampling, bitmask=mask)
                self.assertEqual([token, *(t for t, _ in top)], [second, *allowed])
            token, top = self.draw(session, sampling, edits=bans, bitmask=bitmask)
            self.assertEqual([token, *(t for t, _ in top)], [last, last])
            # Nothing stays behind for the next step.
            self.assertEqual(self.draw(session, sampling)[0], best)
            self.assertEqual(self.draw(session, tenon.SamplingParams(0))[1], [])

            wide = np.zeros(2 * bitmask.size, np.int32)
            for bad in (bitmask[:-1], bitmask[None], wide[::2], wide):
                with self.assertRaisesRegex(ValueError, "bitmask is .* expected shape"):
                    self.draw(session, sampling, bitmask=bad)
            for bad in (bitmask.astype(np.int64), bitmask.view(np.float32), [1] * 8):
                with self.assertRaisesRegex(TypeError, "expected int32|no tensor"):
                    self.draw(session, sampling, bitmask=bad)
            with self.assertRaisesRegex(tenon.TenonError, "twice"):
                self.draw(session, sampling, edits=bans + bans)
            with self.assertRaisesRegex(tenon.TenonError, "6 edits, more than"):
                edits = [tenon.LogitEdit(i) for i in range(6)]
                self.draw(session, sampling, edits=edits)
            sampling.num_top_logprobs = 4
            with self.assertRaisesRegex(tenon.TenonError, "more than max_top_logprobs"):
                self.draw(session, sampling)
        with self.model.session() as session:
            with self.assertRaisesRegex(tenon.TenonError, "bitmask"):
                self.draw(session, tenon.SamplingParams(), bitmask=bitmask)

    def test_two_steps_in_flight(self):
        options = {"max_top_logprobs": 2, "count_experts": True}
        sampling = tenon.SamplingParams(0.9, seed=3, num_top_logprobs=2)
        sampling.mirostat_tau, sampling.mirostat_eta = 3, 0.2
        greedy = tenon.SamplingParams.greedy()
        with self.model.session(**options) as session:
            a, b = session.sequence(), session.sequence()
            rows = [
                tenon.StepRow(a, PROMPT, sampling, tenon.LOGITS_LAST),
                tenon.StepRow(b, PROMPT[:3], greedy),
            ]
            wanted = [session.step(rows)]
            for _ in range(5):
                rows = [
                    tenon.StepRow(a, None, sampling, tenon.LOGITS_LAST),
                    tenon.StepRow(b, wanted[-1].tokens[1], greedy),
                ]
                wanted.append(session.step(rows))
            self.assertNotIn(6.0, [r.mirostat_mu[0] for r in wanted])
            self.assertEqual({r.mirostat_mu[1] for r in wanted}, {0.0})

            c, d = session.sequence(), session.sequence()
            first = [
                tenon.StepRow(c, PROMPT, sampling, tenon.LOGITS_LAST),
                tenon.StepRow(d, PROMPT[:3], greedy),
            ]
            then = [
                tenon.StepRow(c, None, sampling, tenon.LOGITS_LAST),
                tenon.StepRow(d, None, greedy),
            ]
            session.enqueue(first)
            got = []
            for _ in range(5):
                session.enqueue(then)
                self.assertEqual(session.info.num_steps_in_flight, 2)
                got.append(session.wait())
            with self.assertRaisesRegex(tenon.TenonError, "num_steps_in_flight is 1"):
                session.step(then)
            session.enqueue(then)
            with self.assertRaisesRegex(tenon.TenonError, "num_steps_in_flight is 2"):
                session.enqueue(then)
            d.close()  # one step too far
            got += [session.wait(), session.wait()]
            with self.assertRaisesRegex(tenon.TenonError, "num_steps_in_flight is 0"):
                session.wait()
            for mine, theirs in zip(got, wanted):
                self.assertEqual(mine[:3], theirs[:3])
                self.assertEqual(mine.logits[0].tolist(), theirs.logits[0].tolist())
                self.assertEqual(mine.distinct_experts, theirs.distinct_experts)
                self.assertEqual(mine.top, theirs.top)
                self.assertEqual(mine.mirostat_mu, theirs.mirostat_mu)
            with self.assertRaisesRegex(tenon.TenonError, "drew no token"):
                session.step([tenon.StepRow(session.sequence(), None, greedy)])

            # Back to where two tokens had been drawn.
            a.truncate(len(PROMPT) + 1)
            sampling.flags = tenon.SAMPLING_SET_MIROSTAT_MU
            sampling.mirostat_mu = wanted[1].mirostat_mu[0]
            row = tenon.StepRow(a, wanted[1].tokens[0], sampling)
            again = session.step([row])
            self.assertEqual(again.tokens[0], wanted[2].tokens[0])
            self.assertEqual(again.mirostat_mu[0], wanted[2].mirostat_mu[0])

            # What is in flight may end with its session.
            session.enqueue([tenon.StepRow(c, 32, greedy, tenon.LOGITS_LAST)])
            session.enqueue([tenon.StepRow(c, None, greedy)])

    def test_fork_and_truncate(self):
        with self.model.session() as session:
            greedy = tenon.SamplingParams.greedy()
            sequence = session.sequence()
            first = session.step([tenon.StepRow(sequence, PROMPT, greedy)]).tokens[0]
            fork = sequence.fork()
            self.assertEqual(len(fork), len(PROMPT))
            rows = [tenon.StepRow(s, first, greedy) for s in (sequence, fork)]
            tokens = session.step(rows).tokens
            self.assertEqual(tokens[0], tokens[1])
            fork.truncate(len(PROMPT))
            self.assertEqual(
                session.step([tenon.StepRow(fork, first, greedy)]).tokens, tokens[:1]
            )
            self.assertEqual(len(sequence), len(PROMPT) + 1)

    def test_errors_leave_everything_as_it_was(self):
        with self.model.session(max_sequences=2) as session:
            sequence = session.sequence()
            bad = [[-1], [self.model.info.vocab_size], []]
            for tokens in bad:
                with self.assertRaises(tenon.TenonError) as raised:
                    session.step([tenon.StepRow(sequence, tokens)])
                self.assertEqual(raised.exception.code, tenon.INVALID_ARGUMENT)
            with self.assertRaises(tenon.TenonError):
                session.step([tenon.StepRow(sequence, [1])] * 3)
            self.assertEqual(len(sequence), 0)
            sequence.close()
            with self.assertRaises(tenon.TenonError) as raised:
                session.step([tenon.StepRow(sequence, [1])])
            self.assertEqual(raised.exception.code, tenon.NOT_FOUND)

    def test_objects_free_what_they_hold(self):
        session = self.model.session(max_sequences=4)
        free = session.info.num_free_pages
        for _ in range(20):  # more than max_sequences: dropped ones are released
            sequence = session.sequence()
            session.step([tenon.StepRow(sequence, PROMPT)])
            del sequence
            gc.collect()
        self.assertEqual(session.info.num_free_pages, free)
        left = session.sequence()
        session.close()
        with self.assertRaises(tenon.TenonError) as raised:
            len(left)
        self.assertEqual(raised.exception.code, tenon.NOT_FOUND)
        del left
        for _ in range(50):  # no handle stays behind
            self.model.session(max_sequences=1, max_context=64)

    def test_a_session_keeps_its_model(self):
        model = tenon.Model.load(DIRECTORY)
        session = model.session(max_sequences=1)
        model.close()
        self.assertEqual(len(list(session.generate(PROMPT, 4))), 4)
        with self.assertRaises(tenon.TenonError):
            model.session()

    def test_threads_take_turns(self):
        with self.model.session(max_sequences=8) as session:
            wanted = list(session.generate(PROMPT, 24))
            texts = [None] * 4

            def work(i):
                texts[i] = list(session.generate(PROMPT, 24))

            threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(texts, [wanted] * 4)

    def test_progress(self):
        told = []
        tenon.Model.load(
            DIRECTORY, progress=lambda done, total: told.append((done, total))
        )
        self.assertTrue(told)
        self.assertEqual(told[-1][0], told[-1][1])
        self.assertEqual(told, sorted(told))
        with self.assertRaises(tenon.TenonError) as raised:
            tenon.Model.load(DIRECTORY, progress=lambda done, total: False)
        self.assertEqual(raised.exception.code, tenon.CANCELLED)

        def interrupt(done, total):
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            tenon.Model.load(DIRECTORY, progress=interrupt)

    def test_load_errors(self):
        with self.assertRaises(tenon.TenonError) as raised:
            tenon.Model.load("/nonexistent")
        self.assertEqual(raised.exception.code, tenon.NOT_FOUND)
        self.assertIn("/nonexistent", raised.exception.message)

    def test_random_weights(self):
        config = json.loads((pathlib.Path(DIRECTORY) / "config.json").read_text())
        text = json.dumps(config)
        texts = []
        for seed in (1, 1, 2):
            with tenon.Model.random(text, dtype="float32", seed=seed) as model:
                self.assertEqual(model.info.dtype, tenon.DTYPE_FLOAT32)
                with model.session(max_sequences=1) as session:
                    texts.append(list(session.generate(PROMPT, 8, stop=())))
        self.assertEqual(texts[0], texts[1])
        self.assertNotEqual(texts[0], texts[2])


if __name__ == "__main__":
    unittest.main()
