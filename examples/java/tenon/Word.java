package tenon;

/** An argument of a C function: a number, a handle or the address of memory. */
interface Word {
  long word();

  static Word of(long value) {
    return () -> value;
  }
}
