package tenon;

import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.Collection;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * A struct of tenon.h in native memory: zeroed, with its struct_size set. Fields go by their C
 * names. What the struct points to stays alive as long as the struct does.
 */
public class Struct implements Word {
  final Type type;
  private final ByteBuffer bytes;
  private final long address;
  private final Map<String, Object> kept = new HashMap<>();

  Struct(Type type) {
    this(type, Memory.allocate(type.size), 0);
  }

  /** Element {@code index} of an array of structs. */
  Struct(Type type, Memory array, int index) {
    this.type = type;
    bytes = array.bytes.slice(index * type.size, type.size).order(array.bytes.order());
    address = array.word() + (long) index * type.size;
    if (type.has("struct_size")) set("struct_size", type.size);
  }

  public Struct set(String name, long value) {
    Field field = type.field(name);
    switch (field.kind) {
      case UINT8 -> bytes.put(field.offset, (byte) field.check(value, 0, 0xff));
      case UINT16 -> bytes.putShort(field.offset, (short) field.check(value, 0, 0xffff));
      case UINT32 -> bytes.putInt(field.offset, (int) field.check(value, 0, 0xffffffffL));
      case INT32 ->
          bytes.putInt(
              field.offset, (int) field.check(value, Integer.MIN_VALUE, Integer.MAX_VALUE));
      case INT64, UINT64 -> bytes.putLong(field.offset, value);
      case FLOAT32 -> bytes.putFloat(field.offset, value);
      default -> throw new IllegalArgumentException(name + " is no number");
    }
    return this;
  }

  public Struct set(String name, float value) {
    Field field = type.field(name).expect(Kind.FLOAT32);
    bytes.putFloat(field.offset, value);
    return this;
  }

  /** A number in decimal, read as the field's type. */
  public Struct parse(String name, String value) {
    return switch (type.field(name).kind) {
      case FLOAT32 -> set(name, Float.parseFloat(value));
      case UINT64 -> set(name, Long.parseUnsignedLong(value));
      default -> set(name, Long.parseLong(value));
    };
  }

  /** A tensor; null for an optional one that is not given. */
  public Struct set(String name, Tensor tensor) {
    return point(name, tensor);
  }

  /** Another struct, such as the router of moe; null for none. Later changes to it count. */
  public Struct set(String name, Struct struct) {
    return point(name, struct);
  }

  /** A text, which is copied; null for none. */
  public Struct set(String name, String text) {
    return point(name, text == null ? null : Memory.of(text));
  }

  Struct point(String name, Word target) {
    Field field = type.field(name).expect(Kind.POINTER);
    bytes.putLong(field.offset, target == null ? 0 : target.word());
    kept.put(name, target);
    return this;
  }

  /** Keeps something else alive: what the struct points to does not know of it. */
  Struct keep(Object object) {
    kept.put("#" + kept.size(), object);
    return this;
  }

  int getInt(String name) {
    return bytes.getInt(type.field(name).expect(Kind.INT32).offset);
  }

  long getLong(String name) {
    return bytes.getLong(type.field(name).expect(Kind.INT64).offset);
  }

  /** A char array, up to its closing zero. */
  String getText(String name) {
    Field field = type.field(name).expect(Kind.CHAR);
    byte[] text = new byte[field.count];
    bytes.get(field.offset, text);
    int length = 0;
    while (length < text.length && text[length] != 0) ++length;
    return new String(text, 0, length, StandardCharsets.UTF_8);
  }

  @Override
  public long word() {
    return address;
  }

  enum Kind {
    CHAR(1),
    UINT8(1),
    UINT16(2),
    INT32(4),
    UINT32(4),
    INT64(8),
    UINT64(8),
    FLOAT32(4),
    POINTER(8);

    final int size;

    Kind(int size) {
      this.size = size;
    }
  }

  record Field(String name, Kind kind, int offset, int count) {
    int size() {
      return kind.size * count;
    }

    Field expect(Kind expected) {
      if (kind == expected) return this;
      throw new IllegalArgumentException("%s is %s, not %s".formatted(name, kind, expected));
    }

    long check(long value, long min, long max) {
      if (value >= min && value <= max) return value;
      throw new IllegalArgumentException("%s is %d, which no %s holds".formatted(name, value, kind));
    }
  }

  /** Which fields a struct has, and where. */
  static final class Type {
    final String name;
    final int size;
    private final Map<String, Field> fields = new LinkedHashMap<>();

    Type(String name, int size) {
      this.name = name;
      this.size = size;
    }

    Type field(String field, Kind kind, int offset) {
      return field(field, kind, offset, 1);
    }

    Type field(String field, Kind kind, int offset, int count) {
      fields.put(field, new Field(field, kind, offset, count));
      return this;
    }

    boolean has(String field) {
      return fields.containsKey(field);
    }

    Field field(String field) {
      Field found = fields.get(field);
      if (found != null) return found;
      throw new IllegalArgumentException(name + " has no field " + field);
    }

    Collection<Field> fields() {
      return fields.values();
    }
  }
}
