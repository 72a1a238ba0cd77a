package tenon;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.IntBuffer;
import java.util.Arrays;
import java.util.stream.LongStream;

/** A view of a direct ByteBuffer, which it keeps alive; a DLTensor on the CPU. */
public final class Tensor implements Word {
  private final DType dtype;
  private final long[] shape;
  private final long[] strides;
  private final long byteOffset;
  private final Memory data;
  private final Struct descriptor;

  private Tensor(Memory data, DType dtype, long[] shape, long[] strides, long byteOffset) {
    this.dtype = dtype;
    this.shape = shape.clone();
    this.strides = strides == null ? compact(shape) : strides.clone();
    this.byteOffset = byteOffset;
    this.data = data;
    descriptor = new Struct(Layout.DL_TENSOR);
    descriptor.point("data", data);
    descriptor.set("device.device_type", Layout.DL_CPU);
    descriptor.set("dtype.code", dtype.code).set("dtype.bits", dtype.bits).set("dtype.lanes", 1);
    descriptor.set("ndim", shape.length).point("shape", Memory.of(shape));
    descriptor.point("strides", strides == null ? null : Memory.of(strides));
    descriptor.set("byte_offset", byteOffset);
  }

  /** A compact tensor of zeros. */
  public static Tensor zeros(DType dtype, long... shape) {
    long size = new Extent(dtype, shape, compact(shape)).end;
    return new Tensor(Memory.allocate(size), dtype, shape, null, 0);
  }

  /** A copy of float32 values. */
  public static Tensor of(float[] values, long... shape) {
    Tensor tensor = zeros(DType.FLOAT32, shape);
    checkCount(values.length, shape);
    tensor.floats().put(values);
    return tensor;
  }

  /** A copy of int32 values. */
  public static Tensor of(int[] values, long... shape) {
    Tensor tensor = zeros(DType.INT32, shape);
    checkCount(values.length, shape);
    tensor.ints().put(values);
    return tensor;
  }

  /** The direct buffer's bytes from its position on, as a compact tensor. Nothing is copied. */
  public static Tensor wrap(ByteBuffer data, DType dtype, long... shape) {
    return wrap(data, dtype, shape, null, 0);
  }

  /**
   * The same with strides, in elements (null: compact), and the first element {@code byteOffset}
   * after the buffer's position.
   *
   * @throws IllegalArgumentException if an element would lie outside of the buffer
   */
  public static Tensor wrap(
      ByteBuffer data, DType dtype, long[] shape, long[] strides, long byteOffset) {
    Extent extent = new Extent(dtype, shape, strides == null ? compact(shape) : strides);
    if (Math.addExact(byteOffset, extent.begin) < 0
        || Math.addExact(byteOffset, extent.end) > data.remaining()) {
      throw new IllegalArgumentException(
          "%s %s needs the bytes from %d to %d of a buffer with %d"
              .formatted(
                  dtype,
                  Arrays.toString(shape),
                  byteOffset + extent.begin,
                  byteOffset + extent.end,
                  data.remaining()));
    }
    return new Tensor(Memory.of(data), dtype, shape, strides, byteOffset);
  }

  public DType dtype() {
    return dtype;
  }

  public long[] shape() {
    return shape.clone();
  }

  /** In elements. */
  public long[] strides() {
    return strides.clone();
  }

  /** Where in {@link #bytes} the first element is. */
  public long byteOffset() {
    return byteOffset;
  }

  /** The memory, all of it, in native byte order. */
  public ByteBuffer bytes() {
    return data.bytes.duplicate().order(ByteOrder.nativeOrder());
  }

  public FloatBuffer floats() {
    return bytes().asFloatBuffer();
  }

  public IntBuffer ints() {
    return bytes().asIntBuffer();
  }

  @Override
  public long word() {
    return descriptor.word();
  }

  private static void checkCount(int count, long[] shape) {
    if (count == LongStream.of(shape).reduce(1, (a, b) -> a * b)) return;
    throw new IllegalArgumentException(
        "%d values for a shape of %s".formatted(count, Arrays.toString(shape)));
  }

  private static long[] compact(long[] shape) {
    long[] strides = new long[shape.length];
    long stride = 1;
    for (int i = shape.length - 1; i >= 0; --i) {
      strides[i] = stride;
      stride = Math.multiplyExact(stride, Math.max(shape[i], 1));
    }
    return strides;
  }

  /** Where a tensor's elements lie: bytes, relative to the first one. */
  private static final class Extent {
    final long begin;
    final long end;

    Extent(DType dtype, long[] shape, long[] strides) {
      if (strides.length != shape.length) {
        throw new IllegalArgumentException(
            "%d strides for %d dimensions".formatted(strides.length, shape.length));
      }
      long first = 0; // elements
      long last = 0;
      boolean empty = false;
      for (int i = 0; i < shape.length; ++i) {
        if (shape[i] < 0) {
          throw new IllegalArgumentException("a shape of " + Arrays.toString(shape));
        }
        empty |= shape[i] == 0;
        long reach = Math.multiplyExact(Math.max(shape[i] - 1, 0), strides[i]);
        first = Math.addExact(first, Math.min(reach, 0));
        last = Math.addExact(last, Math.max(reach, 0));
      }
      begin = empty ? 0 : Math.multiplyExact(first, (long) dtype.bytes());
      end = empty ? 0 : Math.multiplyExact(Math.addExact(last, 1), (long) dtype.bytes());
    }
  }
}
