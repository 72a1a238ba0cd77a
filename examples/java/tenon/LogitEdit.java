package tenon;

import java.util.List;

/**
 * What to do with one logit: {@code state} has the bits of Layout.EDIT_* and how often the token is
 * in the output, {@code bias} is added before the penalties and {@code offset} after them.
 */
public record LogitEdit(int token, int state, float bias, float offset) {
  private static final Function SORT = new Function("tenon_logit_edits_sort");

  /** The token cannot be drawn. */
  public static LogitEdit ban(int token) {
    return new LogitEdit(token, Layout.EDIT_BAN, 0, 0);
  }

  public static LogitEdit bias(int token, float bias) {
    return new LogitEdit(token, 0, bias, 0);
  }

  /** In the order that the library wants. */
  static Memory sorted(List<LogitEdit> edits, long vocabSize) {
    // One more than there are, so that none have an address too.
    Memory memory = Memory.allocate((long) Layout.LOGIT_EDIT.size * (edits.size() + 1));
    for (int i = 0; i < edits.size(); ++i) {
      LogitEdit edit = edits.get(i);
      new Struct(Layout.LOGIT_EDIT, memory, i)
          .set("id", edit.token)
          .set("state", Integer.toUnsignedLong(edit.state))
          .set("bias", edit.bias)
          .set("offset", edit.offset);
    }
    if (!edits.isEmpty()) SORT.call(memory, Word.of(edits.size()), Word.of(vocabSize));
    return memory;
  }
}
