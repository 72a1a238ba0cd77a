"""Writes the generated files of the Rust binding from abi/layout.json.

  rust.py LAYOUT DIRECTORY           writes tenon_sys.rs and tenon_ops.rs there
  rust.py --check LAYOUT DIRECTORY   fails where they are not what LAYOUT says

Standard library alone.
"""

import json
import pathlib
import sys

SCALARS = {
    "char": "c_char",
    "uint8_t": "u8",
    "uint16_t": "u16",
    "int32_t": "i32",
    "uint32_t": "u32",
    "int64_t": "i64",
    "uint64_t": "u64",
    "size_t": "usize",
    "float": "f32",
    "double": "f64",
    "void": "c_void",
}

# Constants are i32, like the fields that take them, but for these.
CONSTANT_TYPES = {
    "TENON_ABI_": "u32",
    "TENON_FLAG_": "u32",
    "TENON_SESSION_": "u32",
    "TENON_SAMPLING_": "u32",
    "TENON_SAMPLER_": "u32",
    "TENON_EDIT_": "u32",
    "TENON_ROW_": "u32",
    "TENON_DL_INT": "u8",
    "TENON_DL_UINT": "u8",
    "TENON_DL_FLOAT": "u8",
    "TENON_DL_BFLOAT": "u8",
}

# The tensors of each op; "!" marks those that it writes. C's types do not tell
# (all are const DLTensor*), and a tensor that borrows an immutable slice must
# not be accepted where the library writes.
TENSORS = {
    "embedding": "ids table out!",
    "rms_norm": "x residual! weight out!",
    "linear": "x weight bias out! weight_scales",
    "quantize_fp8": "x out! scales!",
    "qk_norm": "qkv! q! k! v q_weight k_weight cos_sin positions k_cache! "
               "v_cache! slot_mapping",
    "attention": "q k_cache v_cache block_table query_start kv_len out!",
    "moe_router": "logits correction_bias topk_weights! topk_ids!",
    "moe_align": "topk_ids expert_offsets! sorted_slots! tiles!",
    "moe_grouped_matmul": "x weights expert_offsets sorted_slots bias "
                          "routing_weights out! weight_scales",
    "moe_swiglu": "x out!",
    "moe_sum_reduce": "x out!",
    "moe": "x topk_weights topk_ids gate up down out! gate_scales up_scales "
           "down_scales",
    "sampler": "logits params tokens! logprobs! statuses! edits edit_offsets "
               "bitmask mirostat_mu! random_bits raw_logprobs! "
               "processed_logprobs! top_tokens! top_logprobs! probabilities!",
    "speculative": "draft_tokens num_drafts target_tokens target_probabilities "
                   "params draft_probabilities tokens! num_accepted! statuses!",
}

# Tensors that are the outputs of an op whose arguments are part of this one's,
# unless they are given: nobody else may read what that op writes.
OF_PART = {
    "moe": {"topk_weights": "router", "topk_ids": "router"},
}

# rustfmt's: of a line, and of the arguments of a call.
MAX_WIDTH = 100
MAX_CALL_WIDTH = 60

SYS_HEAD = """\
//! Declarations of Tenon's C interface; abi/tenon.h says what they mean.
//!
//! Written by tools/bindings/rust.py from abi/layout.json: do not edit.

#![allow(non_camel_case_types)]

use std::ffi::{c_void, CStr};
use std::os::raw::{c_char, c_int};
"""

SYS_LOADER = """\
extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}
const RTLD_NOW: c_int = 2;

unsafe fn last_dl_error() -> String {
    CStr::from_ptr(dlerror()).to_string_lossy().into_owned()
}

/// The function of this name as `F`, which must be its type.
unsafe fn function<F: Copy>(library: *mut c_void, name: &'static str) -> Result<F, String> {
    assert!(name.ends_with('\\0'));
    let address = dlsym(library, name.as_ptr().cast());
    if address.is_null() {
        return Err(last_dl_error());
    }
    Ok(std::mem::transmute_copy(&address))
}

impl Api {
    /// Opens the library, which stays loaded, and checks that it has this ABI's
    /// major version and at least its minor version.
    ///
    /// # Safety
    /// `file` is Tenon's library: its initializers run, and the types of its
    /// functions are not checked.
    pub unsafe fn load(file: &CStr) -> Result<Api, String> {
        let library = dlopen(file.as_ptr(), RTLD_NOW);
        if library.is_null() {
            return Err(last_dl_error());
        }
        let tenon_abi_version: unsafe extern "C" fn() -> u32 =
            function(library, "tenon_abi_version\\0")?;
        let version = tenon_abi_version();
        let (major, minor) = (version >> 16, version & 0xffff);
        if major != TENON_ABI_MAJOR || minor < TENON_ABI_MINOR {
            return Err(format!(
                "{} has ABI {}.{}; this program needs {}.{}",
                file.to_string_lossy(),
                major,
                minor,
                TENON_ABI_MAJOR,
                TENON_ABI_MINOR
            ));
        }
        Ok(Api {
            tenon_abi_version,
%s
        })
    }
}
"""

SYS_LAYOUT = """\
macro_rules! expect_layout {
    ($type:ident, $size:expr, $($field:ident = $offset:expr),*) => {
        let place = std::mem::MaybeUninit::<$type>::uninit();
        let start = place.as_ptr();
        expect(concat!("size of ", stringify!($type)), std::mem::size_of::<$type>(), $size)?;
        $(
            // A field's address, without reading it.
            let field = unsafe { std::ptr::addr_of!((*start).$field) } as usize;
            let name = concat!("offset of ", stringify!($type), ".", stringify!($field));
            expect(name, field - start as usize, $offset)?;
        )*
    };
}

fn expect(what: &str, actual: usize, expected: usize) -> Result<(), String> {
    if actual == expected {
        return Ok(());
    }
    Err(format!("{} is {}, expected {}", what, actual, expected))
}

/// Compares the structs above, as this compiler laid them out, with the C
/// compiler's sizes and offsets.
#[rustfmt::skip]
pub fn check_layout() -> Result<(), String> {
%s
    Ok(())
}
"""

OPS_HEAD = """\
//! The ops: a struct of arguments and methods of [`Context`] for each. The
//! comments at the structs of abi/tenon.h say what they compute and expect.
//!
//! Written by tools/bindings/rust.py from abi/layout.json: do not edit.

use crate::{sys, Context, Result, Tensor, TensorMut, Workspace};
"""


def rust_type(ctype):
    if ctype.endswith("*"):
        if ctype.startswith("const "):
            return "*const " + rust_type(ctype[len("const "):-1])
        return "*mut " + rust_type(ctype[:-1])
    return SCALARS.get(ctype, ctype)


def field_type(field, callbacks):
    result = rust_type(field["type"])
    if result in callbacks:
        return f"Option<{result}>"  # may be NULL
    return f"[{result}; {field['count']}]" if "count" in field else result


def wrap(indent, head, items, tail, max_items=MAX_WIDTH):
    """head, comma-separated items and tail as rustfmt breaks them."""
    joined = ", ".join(items)
    line = f"{indent}{head}{joined}{tail}"
    if len(line) <= MAX_WIDTH and len(joined) <= max_items:
        return line
    lines = "".join(f"{indent}    {item},\n" for item in items)
    return f"{indent}{head}\n{lines}{indent}{tail}"


def function_type(function, indent, head, end):
    params = [f"{p['name']}: {rust_type(p['type'])}" for p in function["params"]]
    start = 'unsafe extern "C" fn('
    tail = f") -> {rust_type(function['returns'])}{end}"
    below = wrap(indent + "    ", start, params, tail)
    beside = wrap(indent, f"{head} {start}", params, tail)
    if "\n" in beside and "\n" not in below:
        return f"{indent}{head}\n{below}"
    return beside


def sys_constant(constant):
    name, value = constant["name"], constant["value"]
    ctype = next((ctype for prefix, ctype in CONSTANT_TYPES.items()
                  if name.startswith(prefix)), "i32")
    return f"pub const {name}: {ctype} = {value};"


def sys_struct(struct, callbacks):
    name = struct["name"]
    lines = ["#[repr(C)]", "#[derive(Clone, Copy)]", f"pub struct {name} {{"]
    lines += [f"    pub {field['name']}: {field_type(field, callbacks)},"
              for field in struct["fields"]]
    lines += ["}", "", f"impl Default for {name} {{"]
    sized = struct["fields"][0]["name"] == "struct_size"
    what = "All zero, but for struct_size." if sized else "All zero."
    lines += [f"    /// {what}", "    fn default() -> Self {",
              "        // SAFETY: zero is a value of every field."]
    if sized:
        lines += ["        let zero: Self = unsafe { std::mem::zeroed() };",
                  "        Self {",
                  "            struct_size: std::mem::size_of::<Self>() as u32,",
                  "            ..zero", "        }"]
    else:
        lines += ["        unsafe { std::mem::zeroed() }"]
    return "\n".join(lines + ["    }", "}"])


def sys_layout(struct):
    fields = [f"        {field['name']} = {field['offset']}"
              for field in struct["fields"]]
    return (f"    expect_layout!({struct['name']}, {struct['size']},\n" +
            ",\n".join(fields) + ");")


def write_sys(layout):
    callbacks = {callback["name"] for callback in layout["callbacks"]}
    functions = layout["functions"]
    parts = [SYS_HEAD]
    parts.append("\n".join(map(sys_constant, layout["constants"])) + "\n")
    parts.append("".join(
        f"pub type {alias['name']} = {rust_type(alias['type'])};\n"
        for alias in layout["types"]))
    parts += [function_type(callback, "", f"pub type {callback['name']} =", ";") +
              "\n" for callback in layout["callbacks"]]
    parts += [sys_struct(struct, callbacks) + "\n"
              for struct in layout["structs"]]
    parts.append(
        "/// The functions of a loaded library.\npub struct Api {\n" +
        "\n".join(function_type(function, "    ", f"pub {function['name']}:", ",")
                  for function in functions) + "\n}\n")
    names = [function["name"] for function in functions
             if function["name"] != "tenon_abi_version"]
    parts.append(SYS_LOADER % "\n".join(
        wrap("            ", f"{name}: function(",
             ["library", f'"{name}\\0"'], ")?,", MAX_CALL_WIDTH)
        for name in names))
    parts.append(SYS_LAYOUT % "\n".join(map(sys_layout, layout["structs"])))
    return "\n".join(parts)


def op_tensors(op, struct):
    """{field: whether the op writes it}, checked against the struct."""
    tensors = {name.rstrip("!"): name.endswith("!")
               for name in TENSORS.get(op, "").split()}
    fields = [field["name"] for field in struct["fields"]
              if field["type"] == "const DLTensor*"]
    if list(tensors) != fields:
        sys.exit(f"rust.py: TENSORS of {op} must list {' '.join(fields)}, "
                 "with ! after those that it writes")
    return tensors


def class_name(op):
    return "".join(word.capitalize() for word in op.split("_"))


def part_of(field):
    """The op whose arguments a field points to (router of moe), or None."""
    c_type = field["type"]
    if not c_type.startswith("const tenon_") or not c_type.endswith("_args*"):
        return None
    return c_type[len("const tenon_"):-len("_args*")]


def write_op(op, struct):
    name = class_name(op)
    tensors = op_tensors(op, struct)
    of_part = OF_PART.get(op, {})
    parts = [field for field in struct["fields"] if part_of(field)]
    needs_workspace = False
    fields, raw = [], []
    for field in struct["fields"]:
        name_ = field["name"]
        if name_ in of_part:
            fields.append(f"    /// That of `{of_part[name_]}`, if none is given.")
            fields.append(f"    pub {name_}: Option<&'a Tensor<'a>>,")
            raw += [f"            {name_}: match {of_part[name_]} {{",
                    f"                Some(part) if self.{name_}.is_none() => "
                    f"part.{name_},",
                    f"                _ => Tensor::pointer(self.{name_}),",
                    "            },"]
        elif name_ in tensors:
            kind = "TensorMut" if tensors[name_] else "Tensor"
            fields.append(f"    pub {name_}: Option<&'a {kind}<'a>>,")
            convert = "TensorMut::pointer" if tensors[name_] else "Tensor::pointer"
            raw.append(f"            {name_}: {convert}(self.{name_}),")
        elif name_ == "workspace":
            needs_workspace = True
        elif field in parts:
            fields.append(f"    pub {name_}: "
                          f"Option<&'a {class_name(part_of(field))}<'a>>,")
            raw.append(f"            {name_}: {name_}.map_or("
                       f"std::ptr::null(), |part| part),")
        elif name_ not in ("struct_size", "workspace_size", "reserved"):
            fields.append(f"    pub {name_}: {rust_type(field['type'])},")
            raw.append(f"            {name_}: self.{name_},")
    lines = [f"/// Arguments of [`Context::{op}`].",
             "#[derive(Clone, Copy, Default)]",
             f"pub struct {name}<'a> {{", *fields, "}", "",
             f"impl {name}<'_> {{",
             wrap("    ", "fn raw(", ["&self"] + [
                 f"{part['name']}: Option<&sys::tenon_{part_of(part)}_args>"
                 for part in parts], f") -> sys::{struct['name']} {{"),
             f"        sys::{struct['name']} {{", *raw,
             "            ..Default::default()", "        }", "    }", "}", "",
             "impl Context {"]
    api = f"self.library.api.tenon_{op}"
    # Structs of other ops that raw() points to.
    made = [f"        let {part['name']} = "
            f"args.{part['name']}.map({class_name(part_of(part))}::raw);"
            for part in parts]
    args = f"args.raw({', '.join(part['name'] + '.as_ref()' for part in parts)})"
    if needs_workspace:
        lines += [
            f"    /// The bytes of workspace that [`Context::{op}`] needs.",
            f"    pub fn {op}_workspace_size(&self, args: &{name}) -> Result<u64> {{",
            *made,
            wrap("        ", "self.workspace_size(",
                 [f"{api}_workspace_size", f"&{args}"], ")", MAX_CALL_WIDTH),
            "    }", "",
            wrap("    ", f"pub fn {op}(",
                 ["&self", f"args: &{name}", "workspace: &mut Workspace"],
                 ") -> Result<()> {"),
            *made,
            f"        let mut raw = {args};",
            "        raw.workspace = workspace.data();",
            "        raw.workspace_size = workspace.size();",
            f"        self.launch({api}, &raw)"]
    else:
        lines += [f"    pub fn {op}(&self, args: &{name}) -> Result<()> {{",
                  f"        self.launch({api}, &args.raw())"]
    return "\n".join(lines + ["    }", "}"]) + "\n"


def write_ops(layout):
    structs = {struct["name"]: struct for struct in layout["structs"]}
    parts = [OPS_HEAD]
    # An op is a function that takes a context, its own args and a stream.
    for function in layout["functions"]:
        op = function["name"][len("tenon_"):]
        if [p["name"] for p in function["params"]] == [
                "context", "args", "stream", "error"]:
            parts.append(write_op(op, structs[f"tenon_{op}_args"]))
    return "\n".join(parts)


def main():
    arguments = sys.argv[1:]
    check = arguments[:1] == ["--check"]
    if len(arguments) != 2 + check:
        sys.exit(__doc__)
    layout_path, directory = map(pathlib.Path, arguments[-2:])
    layout = json.loads(layout_path.read_text())
    for name, write in (("tenon_sys.rs", write_sys), ("tenon_ops.rs", write_ops)):
        text = write(layout)
        if not check:
            (directory / name).write_text(text)
        elif (directory / name).read_text() != text:
            sys.exit(f"{name} is not up to date; run python3 "
                     "tools/bindings/rust.py abi/layout.json examples/rust")


if __name__ == "__main__":
    main()
