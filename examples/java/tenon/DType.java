package tenon;

/** Element types, as DLPack numbers them. */
public enum DType {
  FLOAT32(2, 32),
  FLOAT16(2, 16),
  BFLOAT16(4, 16),
  FLOAT8_E4M3FN(10, 8),
  INT32(0, 32),
  INT64(0, 64),
  UINT8(1, 8);

  final byte code;
  final byte bits;

  DType(int code, int bits) {
    this.code = (byte) code;
    this.bits = (byte) bits;
  }

  public int bytes() {
    return bits / 8;
  }
}
