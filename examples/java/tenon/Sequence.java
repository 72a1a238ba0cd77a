package tenon;

/** A text in the making: tokens whose keys and values its session keeps. */
public final class Sequence extends Handle {
  private static final Function CREATE = new Function("tenon_sequence_create");
  private static final Function FORK = new Function("tenon_sequence_fork");
  private static final Function TRUNCATE = new Function("tenon_sequence_truncate");
  private static final Function LENGTH = new Function("tenon_sequence_length");
  private static final Function RELEASE = new Function("tenon_sequence_release");

  final Session session; // stays alive as long as its sequences

  private Sequence(Session session, Memory handle) {
    this(session, session.word(), handle.bytes.getLong(0));
  }

  private Sequence(Session session, long owner, long handle) {
    super(handle, () -> release(owner, handle));
    this.session = session;
  }

  static Sequence create(Session session) {
    Memory handle = Memory.number();
    CREATE.call(session, handle);
    return new Sequence(session, handle);
  }

  /** A second sequence with the same tokens so far, sharing their memory. */
  public Sequence fork() {
    Memory handle = Memory.number();
    FORK.call(session, this, handle);
    return new Sequence(session, handle);
  }

  /** Forgets all tokens but the first. */
  public void truncate(int numTokens) {
    TRUNCATE.call(session, this, Word.of(numTokens));
  }

  public int length() {
    Memory length = Memory.number();
    LENGTH.call(session, this, length);
    return length.bytes.getInt(0);
  }

  private static void release(long session, long sequence) {
    try {
      RELEASE.call(Word.of(session), Word.of(sequence));
    } catch (TenonException e) {
      if (e.status() != Status.NOT_FOUND) throw e; // it went with its session
    }
  }
}
