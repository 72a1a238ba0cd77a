package tenon;

import java.lang.ref.Cleaner;

/**
 * An object of the library. close() destroys it; one that is forgotten is destroyed some time
 * after it has become unreachable. Using a closed one is a TenonException with NOT_FOUND: the
 * library never reuses a handle.
 */
abstract class Handle implements Word, AutoCloseable {
  private static final Cleaner CLEANER = Cleaner.create();

  private final long value;
  private final Cleaner.Cleanable cleanable;

  Handle(Function destroy, long value) {
    this(value, () -> destroy.call(Word.of(value)));
  }

  /** {@code destroy} must not hold this object, or it would stay reachable. */
  Handle(long value, Runnable destroy) {
    this.value = value;
    cleanable = CLEANER.register(this, destroy);
  }

  @Override
  public long word() {
    return value;
  }

  @Override
  public void close() {
    cleanable.clean();
  }
}
