import java.io.BufferedReader;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.IntBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.stream.Stream;
import tenon.Context;
import tenon.DType;
import tenon.Model;
import tenon.Op;
import tenon.SamplingParams;
import tenon.Sequence;
import tenon.Session;
import tenon.SessionOptions;
import tenon.Tenon;
import tenon.TenonException;
import tenon.Tensor;

/** Holds libtenon to its conformance vectors; tests/abi/conformance/README.md has the format. */
public final class Conformance {
  private static final String ROUTER = "router.";

  /** Memory as it must be after the call. */
  private record Expected(long ulps, byte[] bytes) {}

  private record Rejection(int code, String word) {}

  private static final class Case {
    final String name;
    final String op;
    final Map<String, String> args = new LinkedHashMap<>();
    final Map<String, Tensor> tensors = new LinkedHashMap<>();
    final Map<String, Expected> expected = new LinkedHashMap<>();
    Rejection rejection;

    Case(String name, String op) {
      this.name = name;
      this.op = op;
    }
  }

  private static final class Mismatch extends Exception {
    private static final long serialVersionUID = 1;

    Mismatch(Case test, String message) {
      super(test.name + ": " + message);
    }
  }

  public static void main(String[] args) {
    if (args.length < 2 || args.length > 3) {
      System.err.println("usage: Conformance VECTORS MODEL_DIR [LIBTENON]");
      System.exit(2);
    }
    try {
      if (args.length == 3) Tenon.load(args[2]);
      else Tenon.load();
      System.out.println("libtenon " + Tenon.version());
      run(Path.of(args[0]), Path.of(args[1]));
    } catch (Mismatch | TenonException | IOException e) {
      System.err.println("conformance: " + e.getMessage());
      System.exit(1);
    }
  }

  private static void run(Path vectors, Path modelDirectory) throws Mismatch, IOException {
    String op = "";
    int ofOp = 0;
    int total = 0;
    try (BufferedReader lines = Files.newBufferedReader(vectors, StandardCharsets.US_ASCII);
        Context context = Context.cpu(0);
        Model model = Model.load(modelDirectory)) {
      for (Case test = next(lines); test != null; test = next(lines)) {
        if (!test.op.equals(op)) {
          if (total > 0) System.out.printf("%s: %d cases%n", op, ofOp);
          op = test.op;
          ofOp = 0;
        }
        if (op.equals("generate")) generate(test, model);
        else call(test, context);
        ++ofOp;
        ++total;
      }
    }
    System.out.printf("%s: %d cases%n%d cases passed%n", op, ofOp, total);
  }

  // Reading.

  /** The next case of the file; null at its end. */
  private static Case next(BufferedReader lines) throws IOException {
    Case test = null;
    for (String line = lines.readLine(); line != null; line = lines.readLine()) {
      if (line.isEmpty() || line.startsWith("#")) continue;
      String[] words = line.split(" ");
      switch (words[0]) {
        case "case" -> test = new Case(words[1], words[2]);
        case "arg" -> test.args.put(words[1], words[2]);
        case "tensor" -> test.tensors.put(words[1], tensor(words));
        case "expect" -> test.expected.put(words[1], expected(words));
        case "reject" -> test.rejection = new Rejection(Integer.parseInt(words[1]), words[2]);
        case "end" -> {
          return test;
        }
        default -> throw new IOException("an unknown statement: " + words[0]);
      }
    }
    return null;
  }

  /** tensor FIELD DTYPE SHAPE STRIDES OFFSET HEX. */
  private static Tensor tensor(String[] words) {
    byte[] bytes = HexFormat.of().parseHex(words[6]);
    ByteBuffer data = ByteBuffer.allocateDirect(bytes.length).put(0, bytes);
    long[] strides = words[4].equals("-") ? null : longs(words[4]);
    DType dtype = DType.valueOf(words[2].toUpperCase());
    return Tensor.wrap(data, dtype, longs(words[3]), strides, Long.parseLong(words[5]));
  }

  /** expect FIELD ULPS HEX. */
  private static Expected expected(String[] words) {
    return new Expected(Long.parseLong(words[2]), HexFormat.of().parseHex(words[3]));
  }

  private static long[] longs(String list) {
    return Stream.of(list.split(",")).mapToLong(Long::parseLong).toArray();
  }

  // Running.

  private static void call(Case test, Context context) throws Mismatch {
    Op op = op(test);
    Map<String, Expected> expected = new LinkedHashMap<>();
    test.tensors.forEach((name, tensor) -> expected.put(name, new Expected(0, bytes(tensor))));
    expected.putAll(test.expected);

    try {
      if (op.needsWorkspace()) op.allocateWorkspace(context);
      op.run(context);
      if (test.rejection != null) throw new Mismatch(test, "was not rejected");
    } catch (TenonException e) {
      Rejection rejection = test.rejection;
      if (rejection == null) throw new Mismatch(test, e.getMessage());
      if (e.code() != rejection.code || !e.getMessage().contains(rejection.word)) {
        throw new Mismatch(test, "%s %s".formatted(e.status(), e.getMessage()));
      }
    }
    for (String name : expected.keySet()) {
      compare(test, name, test.tensors.get(name), expected.get(name));
    }
  }

  private static Op op(Case test) {
    Op op = Op.named(test.op);
    Op router = Op.named("moe_router"); // of moe
    test.args.forEach((field, value) -> owner(field, op, router).parse(name(field), value));
    test.tensors.forEach((field, tensor) -> owner(field, op, router).set(name(field), tensor));
    if (test.tensors.containsKey(ROUTER + "logits")) {
      router.set("topk_weights", test.tensors.get("topk_weights"));
      router.set("topk_ids", test.tensors.get("topk_ids"));
      op.set("router", router);
    }
    return op;
  }

  private static Op owner(String field, Op op, Op router) {
    return field.startsWith(ROUTER) ? router : op;
  }

  private static String name(String field) {
    return field.startsWith(ROUTER) ? field.substring(ROUTER.length()) : field;
  }

  private static void generate(Case test, Model model) throws Mismatch {
    SamplingParams sampling = SamplingParams.greedy();
    test.args.forEach(sampling::parse);
    Tensor tokens = test.tensors.get("tokens");
    int[] prompt = new int[Math.toIntExact(test.tensors.get("prompt").shape()[0])];
    test.tensors.get("prompt").ints().get(prompt);

    int count = Math.toIntExact(tokens.shape()[0]);
    try (Session session = Session.create(model, new SessionOptions().maxSequences(2));
        Sequence one = session.createSequence();
        Sequence two = session.createSequence()) {
      int[] next = prompt;
      for (int i = 0; i < count; ++i) {
        int token = session.step(new Session.Row(one, next, sampling)).get(0).token();
        tokens.ints().put(i, token);
        next = new int[] {token};
      }
      System.out.printf("%s: %s%s%n", test.name, text(test, "prompt"), text(test, "tokens"));
      compare(test, "tokens", tokens, test.expected.get("tokens"));

      // With two steps in flight: tokens go from step to step without us.
      session.enqueueStep(new Session.Row(two, prompt, sampling));
      for (int i = 0; i < count; ++i) {
        if (i + 1 < count) session.enqueueStep(Session.Row.next(two, sampling));
        tokens.ints().put(i, session.waitStep().get(0).token());
      }
      compare(test, "tokens", tokens, test.expected.get("tokens"));
    }
  }

  /** A token of this model is a byte; 0 begins a text. */
  private static String text(Case test, String name) {
    StringBuilder text = new StringBuilder();
    IntBuffer tokens = test.tensors.get(name).ints();
    while (tokens.hasRemaining()) text.append((char) tokens.get());
    return text.toString().replace("\0", "");
  }

  // Comparing.

  /** Elements may be some ulps off; everything between and around them is equal. */
  private static void compare(Case test, String name, Tensor tensor, Expected expected)
      throws Mismatch {
    ByteBuffer actual = tensor.bytes();
    ByteBuffer wanted = ByteBuffer.wrap(expected.bytes).order(actual.order());
    ByteBuffer rest = actual.duplicate().order(actual.order());
    if (expected.ulps > 0) rest = forgive(tensor, wanted, expected.ulps);
    int at = rest.mismatch(wanted);
    if (at < 0) return;
    int size = tensor.dtype().bytes();
    long element = Math.floorDiv(at - tensor.byteOffset(), size);
    int begin = (int) (tensor.byteOffset() + element * size);
    throw new Mismatch(
        test,
        "%s, element %d of its memory, byte %d: %s, expected %s"
            .formatted(name, element, at, hex(actual, begin, size), hex(wanted, begin, size)));
  }

  /** A copy of a tensor's memory in which elements that are near enough are the wanted ones. */
  private static ByteBuffer forgive(Tensor tensor, ByteBuffer wanted, long ulps) {
    ByteBuffer memory = ByteBuffer.wrap(bytes(tensor)).order(wanted.order());
    int size = tensor.dtype().bytes();
    long[] shape = tensor.shape();
    long[] strides = tensor.strides();
    long count = Arrays.stream(shape).reduce(1, (a, b) -> a * b);
    for (long i = 0; i < count; ++i) {
      long element = 0;
      long rest = i;
      for (int d = shape.length - 1; d >= 0; rest /= shape[d--]) {
        element += rest % shape[d] * strides[d];
      }
      int at = (int) (tensor.byteOffset() + element * size);
      if (Math.abs(ordinal(memory, at, size) - ordinal(wanted, at, size)) > ulps) continue;
      for (int b = at; b < at + size; ++b) memory.put(b, wanted.get(b));
    }
    return memory;
  }

  /** Numbers the values of a float type in order. */
  private static long ordinal(ByteBuffer memory, int at, int size) {
    if (size == Float.BYTES) {
      int bits = memory.getInt(at);
      return bits >= 0 ? bits : -(long) (bits & Integer.MAX_VALUE);
    }
    short bits = memory.getShort(at);
    return bits >= 0 ? bits : -(bits & Short.MAX_VALUE);
  }

  private static byte[] bytes(Tensor tensor) {
    ByteBuffer memory = tensor.bytes();
    byte[] copy = new byte[memory.capacity()];
    memory.get(0, copy);
    return copy;
  }

  private static String hex(ByteBuffer memory, int at, int size) {
    byte[] element = new byte[Math.min(size, memory.capacity() - Math.max(at, 0))];
    memory.get(Math.max(at, 0), element);
    return HexFormat.of().formatHex(element);
  }
}
