package tenon;

/** What the library reports: a code, and a message naming function, field and value. */
public final class TenonException extends RuntimeException {
  private static final long serialVersionUID = 1;

  private final int code;

  TenonException(int code, String message) {
    super(message);
    this.code = code;
  }

  TenonException(Status status, String message) {
    this(status.ordinal(), message);
  }

  public int code() {
    return code;
  }

  public Status status() {
    return Status.of(code);
  }
}
