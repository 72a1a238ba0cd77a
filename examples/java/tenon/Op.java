package tenon;

import java.nio.ByteBuffer;

/**
 * A call of an op: its arguments, which can be run again and again, by one thread at a time.
 * {@link Ops} has a subclass with a typed setter for every field.
 */
public class Op extends Struct {
  private final Function run;
  private final Function workspaceSize;

  Op(Struct.Type type) {
    super(type);
    String name = type.name.substring(0, type.name.length() - "_args".length());
    run = new Function(name);
    workspaceSize = new Function(name + "_workspace_size");
  }

  /** An op by its name in tenon.h without the prefix, such as "rms_norm". */
  public static Op named(String name) {
    for (Struct.Type type : Layout.ALL) {
      if (type.name.equals("tenon_" + name + "_args")) return new Op(type);
    }
    throw new IllegalArgumentException("no op is called " + name);
  }

  public boolean needsWorkspace() {
    return type.has("workspace");
  }

  /** In bytes: an upper bound for arguments of these shapes and for fewer tokens. */
  public long workspaceSize(Context context) {
    Memory bytes = Memory.number();
    workspaceSize.call(context, this, bytes);
    return bytes.bytes.getLong(0);
  }

  /** Allocates the scratch memory that these arguments need. */
  public Op allocateWorkspace(Context context) {
    return workspace(Memory.allocate(workspaceSize(context)));
  }

  /** Scratch memory of the caller: a direct buffer, aligned to 64 bytes. */
  public Op workspace(ByteBuffer buffer) {
    return workspace(Memory.of(buffer));
  }

  private Op workspace(Memory memory) {
    point("workspace", memory);
    set("workspace_size", memory.bytes.capacity());
    return this;
  }

  /**
   * Runs it to its end, on the threads of a context or, with null, on this one alone.
   *
   * @throws TenonException naming the field that is wrong; then nothing has changed
   */
  public void run(Context context) {
    run.call(context, this, null);
  }
}
