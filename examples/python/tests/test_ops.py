"""Every function of the binding once, against NumPy, and what it says of errors."""

import os
import unittest

import numpy as np

import tenon

f32 = np.float32


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(f32)


def rms(x, weight, epsilon=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def silu(x):
    return x / (1 + np.exp(-x))


class OpTest(unittest.TestCase):
    def close(self, actual, expected, tolerance=1e-5):
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)

    def test_embedding(self):
        table = normal(10, 4)
        out = tenon.embedding(np.array([3, 9, -1, 10], np.int64), table)
        np.testing.assert_array_equal(out[:2], table[[3, 9]])
        self.assertFalse(out[2:].any())

    def test_rms_norm(self):
        x, weight, residual = normal(3, 16), normal(16), normal(3, 16, seed=1)
        self.close(tenon.rms_norm(x, weight), rms(x, weight))
        total = x + residual
        out = tenon.rms_norm(x, weight, residual=residual, out=x)
        self.assertIs(out, x)
        np.testing.assert_array_equal(residual, total)
        self.close(x, rms(total, weight))

    def test_rms_norm_rounding(self):
        x, weight = normal(3, 64).astype(np.float16), normal(64).astype(np.float16)
        outs = [
            tenon.rms_norm(x, weight, rounding=r)
            for r in (
                tenon.ROUNDING_FLOAT32_MULTIPLY,
                tenon.ROUNDING_CAST_THEN_MULTIPLY,
            )
        ]
        self.assertEqual(outs[0].dtype, np.float16)
        self.assertTrue((outs[0] != outs[1]).any())

    def test_linear(self):
        x, weight, bias = normal(5, 16), normal(7, 16), normal(7)
        self.close(tenon.linear(x, weight, bias=bias), x @ weight.T + bias)
        half = tenon.linear(
            x.astype(np.float16), weight.astype(np.float16), out_dtype="float32"
        )
        self.assertEqual(half.dtype, f32)
        self.close(half, x @ weight.T, 0.05)
        size = tenon.linear_workspace_size(x, weight)
        workspace = np.empty(size + 64, np.uint8)
        self.close(tenon.linear(x, weight, workspace=workspace), x @ weight.T)

    def rotate(self, x, positions, cos_sin):
        half = cos_sin.shape[1] // 2
        cos, sin = (
            cos_sin[positions][:, None, i * half : (i + 1) * half] for i in (0, 1)
        )
        a, b = x[..., :half], x[..., half : 2 * half]
        return np.concatenate(
            [a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1
        )

    def test_qk_norm(self):
        tokens, heads, kv_heads, dim = 3, 4, 2, 64
        qkv = normal(tokens, (heads + 2 * kv_heads) * dim)
        q_weight, k_weight = normal(dim, seed=1), normal(dim, seed=2)
        cos_sin = normal(16, dim, seed=3)
        positions = np.array([0, 5, 9], np.int64)
        slots = np.array([4, -1, 7], np.int64)
        k_cache, v_cache = np.zeros((2, 2, 4, kv_heads, dim), f32)
        split = qkv.reshape(tokens, -1, dim)
        q, k, v = (s.copy() for s in np.split(split, [heads, heads + kv_heads], 1))
        wanted_q = self.rotate(rms(q, q_weight), positions, cos_sin)
        wanted_k = self.rotate(rms(k, k_weight), positions, cos_sin)
        options = dict(cos_sin=cos_sin, positions=positions, slot_mapping=slots)
        tenon.qk_norm(
            q, k, q_weight, k_weight, v=v, k_cache=k_cache, v_cache=v_cache, **options
        )
        self.close(q, wanted_q)
        self.close(k, wanted_k)
        for cache, rows in ((k_cache, k), (v_cache, v)):
            flat = cache.reshape(8, kv_heads, dim)
            np.testing.assert_array_equal(flat[[4, 7]], rows[[0, 2]])
            self.assertFalse(np.delete(flat, [4, 7], 0).any())
        packed_caches = np.zeros((2, 2, 4, kv_heads, dim), f32)
        tenon.qk_norm_packed(
            qkv, q_weight, k_weight, num_q_heads=heads, num_kv_heads=kv_heads,
            head_dim=dim, k_cache=packed_caches[0], v_cache=packed_caches[1], **options,
        )  # fmt: skip
        np.testing.assert_array_equal(
            qkv.reshape(tokens, -1, dim), np.concatenate([q, k, v], 1)
        )
        np.testing.assert_array_equal(packed_caches, [k_cache, v_cache])

    def test_qk_norm_forgets_the_call_before(self):
        """Args are used again: what one call gives, the next must not see."""
        self.test_qk_norm()
        q, k, weight = normal(2, 4, 64), normal(2, 2, 64), np.ones(64, f32)
        wanted = rms(q, weight)
        tenon.qk_norm(q, k, weight, weight)
        self.close(q, wanted)

    def test_attention(self):
        heads, kv_heads, dim, page = 4, 2, 64, 4
        cache = normal(2, 3, page, kv_heads, dim)
        q = normal(3, heads, dim, seed=1)
        table = np.array([[2, 0, 1]], np.int32)
        arguments = (
            q, cache[0], cache[1], table, np.array([0, 3], np.int32), np.array([9], np.int32),
        )  # fmt: skip
        k, v = (
            c[table[0]].reshape(-1, kv_heads, dim).repeat(heads // kv_heads, 1)
            for c in cache
        )
        wanted = np.empty_like(q)
        for i in range(3):
            n = 9 - 3 + i + 1
            scores = np.einsum("hd,nhd->hn", q[i], k[:n]) / np.sqrt(dim)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            wanted[i] = np.einsum("hn,nhd->hd", p / p.sum(-1, keepdims=True), v[:n])
        self.close(tenon.attention(*arguments), wanted)
        workspace = np.empty(tenon.attention_workspace_size(*arguments) + 64, np.uint8)
        self.close(
            tenon.attention(*arguments, workspace=workspace, batch_invariant=True),
            wanted,
        )

    def test_moe_router(self):
        logits = normal(3, 8)
        weights, ids = tenon.moe_router(logits, 2)
        p = np.exp(logits)
        order = np.argsort(-logits, 1, kind="stable")[:, :2]
        np.testing.assert_array_equal(ids, order)
        chosen = np.take_along_axis(p, order, 1)
        self.close(weights, chosen / chosen.sum(1, keepdims=True))
        weights, _ = tenon.moe_router(
            logits, 2, renormalize=False, routed_scaling_factor=2.5
        )
        self.close(weights, 2.5 * chosen / p.sum(1, keepdims=True))
        weights, ids = tenon.moe_router(
            logits, 2, scoring=tenon.SCORING_SIGMOID, num_fused_shared_experts=1,
            correction_bias=np.zeros(8, f32), num_expert_groups=2, num_selected_groups=2,
            group_score=tenon.GROUP_SCORE_TOP2_SUM,
        )  # fmt: skip
        np.testing.assert_array_equal(ids[:, :2], order)
        np.testing.assert_array_equal(ids[:, 2], 8)

    def test_moe_stages_make_the_layer(self):
        tokens, top_k, experts, hidden, intermediate = 5, 2, 4, 16, 8
        x, logits = normal(tokens, hidden), normal(tokens, experts, seed=1)
        w13 = normal(experts, 2 * intermediate, hidden, seed=2)
        down = normal(experts, hidden, intermediate, seed=3)
        weights, ids = tenon.moe_router(logits, top_k)
        wanted = np.zeros_like(x)
        for t in range(tokens):
            for weight, e in zip(weights[t], ids[t]):
                gate, up = np.split(w13[e] @ x[t], 2)
                wanted[t] += weight * (down[e] @ (silu(gate) * up))
        layer = tenon.moe(
            x, weights, ids, w13[:, :intermediate], w13[:, intermediate:], down
        )
        self.close(layer, wanted, 1e-4)
        routed = tenon.moe(
            x, None, None, w13[:, :intermediate], w13[:, intermediate:], down,
            router=tenon.MoeRouter(logits, top_k),
        )  # fmt: skip
        np.testing.assert_array_equal(routed, layer)

        groups = tenon.moe_align(ids, experts, tile_rows=4)
        self.assertEqual(
            groups.tiles.shape[0], tenon.moe_max_tiles(tokens * top_k, experts, 4)
        )
        np.testing.assert_array_equal(
            np.diff(groups.expert_offsets), np.bincount(ids.ravel(), minlength=experts)
        )
        np.testing.assert_array_equal(
            np.sort(groups.sorted_slots), np.arange(tokens * top_k)
        )
        gate_up = tenon.moe_grouped_matmul(
            x, w13, groups.expert_offsets, groups.sorted_slots, slots_per_row=top_k
        )
        h = tenon.moe_swiglu(gate_up)
        rows = tenon.moe_grouped_matmul(
            h, down, groups.expert_offsets, groups.sorted_slots, slots_per_row=1,
            routing_weights=weights.reshape(-1),
        )  # fmt: skip
        out = tenon.moe_sum_reduce(rows.reshape(tokens, top_k, hidden))
        self.close(out, wanted, 1e-4)
        for size in (
            tenon.moe_workspace_size(
                x, weights, ids, w13[:, :intermediate], w13[:, intermediate:], down
            ),
            tenon.moe_align_workspace_size(ids, experts),
            tenon.moe_grouped_matmul_workspace_size(
                x, w13, groups.expert_offsets, groups.sorted_slots, slots_per_row=top_k
            ),
        ):
            self.assertGreaterEqual(size, 0)

    def test_swiglu_layouts(self):
        gate, up = normal(3, 8), normal(3, 8, seed=1)
        interleaved = np.stack([gate, up], -1).reshape(3, 16)
        out = tenon.moe_swiglu(interleaved, layout=tenon.SWIGLU_INTERLEAVED)
        self.close(out, silu(gate) * up)

    def test_sampler(self):
        logits = normal(4, 100)
        best = logits.argmax(1)
        samples = tenon.sampler(
            logits, [tenon.SamplingParams.greedy()] * 4, logprobs=True
        )
        np.testing.assert_array_equal(samples.tokens, best)
        self.assertFalse(samples.statuses.any())
        wanted = logits.max(1) - np.log(np.exp(logits).sum(1))
        self.close(samples.logprobs, wanted)
        rows = [tenon.SamplingParams(top_k=1, seed=i) for i in range(4)]
        packed = np.frombuffer(tenon.SamplingParams.pack(rows), np.uint8).reshape(
            4, 128
        )
        samples = tenon.sampler(logits, packed)
        np.testing.assert_array_equal(samples.tokens, best)
        self.assertIsNone(samples.logprobs)
        self.assertGreaterEqual(tenon.sampler_workspace_size(logits, packed), 0)

    def test_sampling_params(self):
        params = tenon.SamplingParams(temperature=0.5, seed=2**64 - 1)
        self.assertEqual((params.top_p, params.top_k, params.seed), (1.0, 0, 2**64 - 1))
        params.validate()
        with self.assertRaisesRegex(tenon.TenonError, "temperature"):
            tenon.SamplingParams(temperature=-1.0).validate()

    def test_no_rows(self):
        x = np.empty((0, 16), f32)
        self.assertEqual(tenon.rms_norm(x, normal(16)).shape, (0, 16))
        weights, ids = tenon.moe_router(np.empty((0, 8), f32), 2)
        self.assertEqual((weights.shape, ids.shape), ((0, 2), (0, 2)))

    def test_contexts(self):
        x, weight = normal(64, 32), normal(32)
        alone = tenon.rms_norm(x, weight)
        with tenon.Context("cpu", num_threads=2) as context:
            self.assertEqual(context.info.num_threads, 2)
            out = tenon.rms_norm(x, weight, context=context)
            self.assertEqual(out.tobytes(), alone.tobytes())
        with self.assertRaises(tenon.TenonError) as raised:
            tenon.rms_norm(x, weight, context=context)
        self.assertEqual(raised.exception.code, tenon.NOT_FOUND)
        context.close()  # a second time does nothing


class ErrorTest(unittest.TestCase):
    def refuses(self, code, *words):
        test = self

        class Context:
            def __enter__(self):
                return self

            def __exit__(self, kind, error, _):
                test.assertIs(kind, tenon.TenonError)
                test.assertEqual(error.code, code)
                for word in words:
                    test.assertIn(word, error.message)
                return True

        return Context()

    def test_messages_name_function_field_and_value(self):
        x, weight = normal(2, 16), normal(16)
        with self.refuses(tenon.INVALID_ARGUMENT, "tenon_rms_norm", "epsilon", "-1"):
            tenon.rms_norm(x, weight, epsilon=-1.0)
        with self.refuses(tenon.INVALID_ARGUMENT, "tenon_rms_norm", "weight"):
            tenon.rms_norm(x, normal(15))
        with self.refuses(tenon.INVALID_ARGUMENT, "tenon_rms_norm", "stream"):
            tenon.rms_norm(x, weight, stream=1234)
        with self.refuses(tenon.INVALID_ARGUMENT, "workspace"):
            logits = np.tile(normal(1, 50_000), (64, 1))
            params = [tenon.SamplingParams(top_p=0.5)] * 64
            packed = np.frombuffer(tenon.SamplingParams.pack(params), np.uint8).reshape(
                64, 128
            )
            if tenon.sampler_workspace_size(logits, packed) == 0:
                raise tenon.TenonError(tenon.INVALID_ARGUMENT, "no workspace needed")
            tenon.sampler(logits, packed, workspace=np.empty(64, np.uint8))

    def test_str_has_the_codes_name(self):
        error = tenon.TenonError(tenon.NOT_FOUND, "tenon_x: gone")
        self.assertEqual(str(error), "tenon_x: gone (NOT_FOUND)")

    def test_tensors_of_another_device(self):
        x = normal(2, 16)
        elsewhere = tenon.Tensor(normal(2, 16))
        elsewhere._dl.device_type = 2
        with self.refuses(tenon.INVALID_ARGUMENT, "tenon_rms_norm: out", "cuda:0"):
            tenon.rms_norm(x, normal(16), out=elsewhere, stream=0)

    def test_call_sets_what_it_is_told(self):
        x, out = normal(2, 16), np.empty((2, 16), f32)
        tenon.call("rms_norm", x=x, weight=normal(16, seed=1), out=out, epsilon=1e-6)
        self.assertEqual(out.tobytes(), tenon.rms_norm(x, normal(16, seed=1)).tobytes())
        with self.refuses(tenon.INVALID_ARGUMENT, "reserved"):
            tenon.call("rms_norm", x=x, weight=x[0], out=out, epsilon=1e-6, reserved=1)
        with self.refuses(tenon.INVALID_ARGUMENT, "out"):
            tenon.call("rms_norm", x=x, weight=x[0], epsilon=1e-6)
        with self.assertRaisesRegex(TypeError, "no field colour"):
            tenon.call("rms_norm", colour=1)

    def test_streams(self):
        class Stream:
            def __cuda_stream__(self):
                return 0, 0

        tenon.rms_norm(normal(2, 16), normal(16), stream=Stream())
        with self.assertRaisesRegex(TypeError, "stream"):
            tenon.rms_norm(normal(2, 16), normal(16), stream="0")


class DeviceTest(unittest.TestCase):
    def test_cpu(self):
        self.assertEqual(tenon.device_count("cpu"), 1)
        info = tenon.device_info("cpu")
        self.assertGreaterEqual(info.num_cores, 1)
        self.assertLessEqual(info.num_cores, os.cpu_count())
        self.assertIn(info.cpu_isa, (1, 2, 3))
        self.assertIsInstance(info.name, str)
        self.assertIn("num_cores=", repr(info))

    def test_absent(self):
        count = tenon.device_count("cuda")
        with self.assertRaises(tenon.TenonError) as raised:
            tenon.device_info(f"cuda:{count}")
        self.assertEqual(raised.exception.code, tenon.UNAVAILABLE)
        for name in ("tpu", "cuda:x", "cuda:-1"):
            with self.assertRaisesRegex(ValueError, "device"):
                tenon.device_info(name)

    def test_versions(self):
        self.assertRegex(tenon.version(), r"^\d+\.\d+\.\d+")


if __name__ == "__main__":
    unittest.main()
