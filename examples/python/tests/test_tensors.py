"""How tensors get to the library: pointers, strides, lifetimes, refusals."""

import array
import ctypes
import gc
import sys
import threading
import tracemalloc
import unittest
import weakref

import numpy as np

import tenon


def convert(obj, written=False):
    """The DLTensor that the library would see, and what keeps it valid."""
    slot, keep = tenon._DLTensor(), []
    address = tenon._address("x", obj, written, ctypes.addressof(slot), keep)
    return tenon._DLTensor.from_address(address), (slot, keep)


def dims(tensor, field):
    pointer = getattr(tensor, field)
    return (
        list((ctypes.c_int64 * tensor.ndim).from_address(pointer)) if pointer else None
    )


class VersionedProducer:
    """What DLPack 1.x frameworks hand out: counts how often it is freed."""

    def __init__(self, base, read_only=False, major=1):
        self.base, self.freed = base, 0
        given, self.keep = convert(base)
        self.memory = (ctypes.c_uint64 * 10)()
        self.memory[0] = major | 1 << 32
        self.memory[3] = int(read_only)
        ctypes.memmove(ctypes.addressof(self.memory) + 32, ctypes.addressof(given), 48)
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(self.on_free)
        self.make = lambda: make(
            ctypes.addressof(self.memory),
            b"dltensor_versioned",
            ctypes.cast(self.destructor, ctypes.c_void_p),
        )

    def on_free(self, _):
        self.freed += 1

    def __dlpack__(self, *, stream=None, max_version=None):
        assert max_version[0] == 1
        return self.make()

    def __dlpack_device__(self):
        return 1, 0


class ZeroCopyTest(unittest.TestCase):
    def test_numpy_memory_is_used_as_it_lies(self):
        base = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
        for x in (base, base[1:, ::2], base[:, :, 2], base.transpose(2, 0, 1)):
            tensor, _keep = convert(x)
            self.assertEqual(tensor.data + tensor.byte_offset, x.ctypes.data)
            self.assertEqual(dims(tensor, "shape"), list(x.shape))
            strides = dims(tensor, "strides")
            if strides is None:
                self.assertTrue(x.flags.c_contiguous)
            else:
                self.assertEqual(strides, [s // 4 for s in x.strides])
            self.assertEqual((tensor.dtype_code, tensor.dtype_bits), (2, 32))
            self.assertEqual((tensor.device_type, tensor.device_id), (1, 0))

    def test_dtypes(self):
        for dtype, code in {
            np.float32: (2, 32),
            np.float16: (2, 16),
            np.int32: (0, 32),
            np.int64: (0, 64),
            np.uint8: (1, 8),
        }.items():
            tensor, _keep = convert(np.zeros(3, dtype))
            self.assertEqual((tensor.dtype_code, tensor.dtype_bits), code)
            self.assertEqual(tensor.dtype_lanes, 1)

    def test_array_interface_alone(self):
        class Array:
            def __init__(self, base):
                self.__array_interface__ = base.__array_interface__

        x = np.zeros((4, 6), np.int32)[::2, 1:]
        tensor, _keep = convert(Array(x), written=True)
        self.assertEqual(tensor.data + tensor.byte_offset, x.ctypes.data)
        self.assertEqual(dims(tensor, "strides"), [12, 1])

    def test_writes_arrive_in_a_strided_view(self):
        memory = np.full((4, 8), 7, np.float32)
        tenon.rms_norm(
            np.ones((2, 4), np.float32),
            np.ones(4, np.float32),
            out=memory[::2, :4],
            epsilon=1e-6,
        )
        np.testing.assert_allclose(memory[::2, :4], 1, rtol=1e-5)
        self.assertTrue((memory[1::2] == 7).all() and (memory[:, 4:] == 7).all())

    def test_bfloat16_as_uint16(self):
        x = np.zeros((2, 8), np.uint16)
        tensor = tenon.as_bfloat16(x)
        self.assertEqual(tensor.data, x.ctypes.data)
        self.assertEqual(tensor.dtype, "bfloat16")
        self.assertIs(tensor.base, x)
        out = tenon.rms_norm(tensor, np.ones(8, np.float32))
        self.assertEqual(out.dtype, "bfloat16")
        self.assertEqual(out.base.dtype, np.uint16)
        with self.assertRaisesRegex(TypeError, "bits"):
            tenon.as_bfloat16(np.zeros(2, np.float32))

    def test_ml_dtypes(self):
        try:
            import ml_dtypes
        except ImportError:
            self.skipTest("ml_dtypes is not installed")
        tensor, _keep = convert(np.zeros(4, ml_dtypes.bfloat16), written=True)
        self.assertEqual((tensor.dtype_code, tensor.dtype_bits), (4, 16))
        tensor, _keep = convert(np.zeros(4, ml_dtypes.float8_e4m3fn))
        self.assertEqual((tensor.dtype_code, tensor.dtype_bits), (10, 8))

    def test_dtypes_of_other_libraries_go_by_their_name(self):
        class BFloat16Array:  # as arrays of ml_dtypes look
            dtype = "bfloat16"

            def __init__(self, base):
                self.__array_interface__ = dict(base.__array_interface__, typestr="<V2")

        tensor, _keep = convert(BFloat16Array(np.zeros((2, 3), np.uint16)))
        self.assertEqual((tensor.dtype_code, tensor.dtype_bits), (4, 16))
        self.assertEqual(dims(tensor, "shape"), [2, 3])

    def test_buffers(self):
        memory = array.array("f", range(12))
        tensor = tenon.Tensor.from_buffer(memory, "float32", (2, 3), (5, 1), 4)
        self.assertEqual(tensor.data, memory.buffer_info()[0] + 4)
        for shape, strides, offset in (
            ((4, 4), None, 0),
            ((2, 3), (9, 1), 4),
            ((12,), None, 4),
        ):
            with self.assertRaisesRegex(ValueError, "ends at byte"):
                tenon.Tensor.from_buffer(memory, "float32", shape, strides, offset)
        with self.assertRaisesRegex(ValueError, "negative"):
            tenon.Tensor.from_buffer(memory, "float32", (2, 3), (-3, 1))
        with self.assertRaises(TypeError):
            tenon.Tensor.from_buffer(b"read-only", "uint8", (4,))


class RefusalTest(unittest.TestCase):
    def test_read_only_arrays_are_read_but_not_written(self):
        x = np.ones((2, 4), np.float32)
        x.flags.writeable = False
        weight = np.ones(4, np.float32)
        out = tenon.rms_norm(x, weight)
        np.testing.assert_allclose(out, 1, rtol=1e-5)
        for arguments in ({"out": x}, {"residual": x}, {"out": tenon.Tensor(x)}):
            with self.assertRaisesRegex(BufferError, "read-only"):
                tenon.rms_norm(x, weight, **arguments)
        with self.assertRaisesRegex(BufferError, "workspace is read-only"):
            tenon.linear(out, out, workspace=x)

    def test_what_is_no_tensor(self):
        weight = np.ones(4, np.float32)
        for x in ([1.0, 2.0], "text", object()):
            with self.assertRaisesRegex(TypeError, "x is a .*no tensor"):
                tenon.rms_norm(x, weight, out=weight)

    def test_dtypes_without_a_name(self):
        out = np.ones((1, 4), np.float32)
        for x in (np.zeros((1, 4), "M8[s]"), np.zeros((1, 4), object)):
            with self.assertRaises(TypeError):
                tenon.rms_norm(x, out[0], out=out)
        with self.assertRaises(TypeError):
            tenon.rms_norm(out.astype(">f4"), out[0], out=out)

    def test_odd_strides(self):
        packed = np.zeros(4, dtype=[("a", np.uint8), ("x", np.float32)])
        with self.assertRaisesRegex(BufferError, "strides"):
            tenon.rms_norm(
                packed["x"][None],
                np.ones(4, np.float32),
                out=np.ones((1, 4), np.float32),
            )


class CapsuleTest(unittest.TestCase):
    def test_versioned_capsules_are_borrowed(self):
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        producer = VersionedProducer(x)
        tensor, keep = convert(producer, written=True)
        self.assertEqual(tensor.data + tensor.byte_offset, x.ctypes.data)
        self.assertEqual(producer.freed, 0)
        del keep
        self.assertEqual(producer.freed, 1)
        out = tenon.rms_norm(producer, x[0], out=np.empty_like(x))
        self.assertEqual(producer.freed, 2)
        np.testing.assert_array_equal(out, tenon.rms_norm(x, x[0]))

    def test_the_read_only_flag_counts(self):
        x = np.ones((2, 4), np.float32)
        producer = VersionedProducer(x, read_only=True)
        tenon.rms_norm(producer, x[0], out=x.copy())
        with self.assertRaisesRegex(
            BufferError, "out is read-only|out: out is read-only"
        ):
            tenon.rms_norm(x, x[0], out=producer)

    def test_another_major_version_is_refused(self):
        x = np.ones((2, 4), np.float32)
        producer = VersionedProducer(x, major=2)
        with self.assertRaisesRegex(BufferError, "major version"):
            tenon.rms_norm(producer, x[0], out=x)
        self.assertEqual(producer.freed, 1)

    def test_a_tensor_owns_what_it_was_made_of(self):
        x = np.ones((2, 4), np.float32)
        gone = weakref.ref(x)
        tensor = tenon.Tensor(x)
        del x
        gc.collect()
        self.assertIsNotNone(gone())
        del tensor
        gc.collect()
        self.assertIsNone(gone())


class LeakTest(unittest.TestCase):
    def test_references_are_returned(self):
        x = np.ones((2, 8), np.float32)
        weight, out = np.ones(8, np.float32), np.empty_like(x)
        wrapped = tenon.Tensor(x)
        objects = (x, weight, out, wrapped)

        def calls(n):
            for _ in range(n):
                tenon.rms_norm(x, weight, out=out)
                tenon.rms_norm(wrapped, weight)
                tenon.linear(x, x)
                try:
                    tenon.rms_norm(x, out, out=out)
                except tenon.TenonError:
                    pass

        calls(100)
        before = [sys.getrefcount(o) for o in objects]
        tracemalloc.start()
        try:
            calls(100)
            gc.collect()
            first = tracemalloc.get_traced_memory()[0]
            calls(10_000)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - first
        finally:
            tracemalloc.stop()
        self.assertEqual([sys.getrefcount(o) for o in objects], before)
        self.assertLess(grown, 20_000)

    def test_threads_share_nothing(self):
        weight = np.ones(64, np.float32)
        wrong = []

        def work(seed):
            x = np.random.default_rng(seed).standard_normal((seed + 1, 64), np.float32)
            expected = tenon.rms_norm(x, weight)
            for _ in range(500):
                out = tenon.rms_norm(x, weight)
                if out.tobytes() != expected.tobytes():
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])


if __name__ == "__main__":
    unittest.main()
