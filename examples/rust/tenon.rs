//! A safe Rust interface to libtenon.so.
//!
//! Nothing here can crash or corrupt memory, whatever it is given, except
//! through functions marked `unsafe`: those that take raw pointers (CUDA
//! memory) and the one that loads the library. The raw interface is [`sys`].

#[path = "tenon_ops.rs"]
pub mod ops;
#[path = "tenon_sys.rs"]
pub mod sys;

mod engine;
mod tensor;

pub use engine::{LoadOptions, Logits, Model, Row, Sampled, Sequence, Session};
pub use sys::tenon_context_options as ContextOptions;
pub use sys::tenon_logit_edit as LogitEdit;
pub use sys::tenon_sampling_params as SamplingParams;
pub use sys::tenon_session_options as SessionOptions;
pub use tensor::{sampling_bytes, Bf16, DType, Element, Tensor, TensorMut, Workspace, F16, F8E4M3};

use std::ffi::{c_void, CStr, CString};
use std::fmt;

/// What a function of the library failed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// One of `sys::TENON_*`.
    pub code: i32,
    /// Names function, field and value.
    pub message: String,
    name: &'static str,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn invalid_argument(message: String) -> Error {
        Error {
            code: sys::TENON_INVALID_ARGUMENT,
            message,
            name: "INVALID_ARGUMENT",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.message)
    }
}

impl std::error::Error for Error {}

/// The loaded library. It stays loaded for the life of the process, so copies
/// of this are free.
#[derive(Clone, Copy)]
pub struct Library {
    api: &'static sys::Api,
}

impl Library {
    /// Opens `file`: a path, or a name such as "libtenon.so.1" that the dynamic
    /// linker looks for.
    ///
    /// # Safety
    /// The file is Tenon's library, since its code is run.
    pub unsafe fn open(file: &str) -> Result<Library> {
        let unavailable = |message| Error {
            code: sys::TENON_UNAVAILABLE,
            message,
            name: "UNAVAILABLE",
        };
        sys::check_layout().map_err(unavailable)?;
        let api = sys::Api::load(&c_string(file)?).map_err(unavailable)?;
        Ok(Library {
            api: Box::leak(Box::new(api)),
        })
    }

    /// The library's ABI version, (major, minor).
    pub fn abi_version(&self) -> (u32, u32) {
        let version = unsafe { (self.api.tenon_abi_version)() };
        (version >> 16, version & 0xffff)
    }

    /// The release, such as "0.1.0".
    pub fn version(&self) -> &'static str {
        constant(unsafe { (self.api.tenon_version_string)() })
    }

    pub fn status_name(&self, code: i32) -> &'static str {
        constant(unsafe { (self.api.tenon_status_name)(code) })
    }

    /// How many devices of a `sys::TENON_DEVICE_*` type can be used.
    pub fn device_count(&self, device_type: i32) -> Result<i32> {
        let mut count = 0;
        self.call(|error| unsafe {
            (self.api.tenon_device_count)(device_type, &mut count, error)
        })?;
        Ok(count)
    }

    /// The model's own distribution: temperature 1, no filters.
    pub fn sampling_params(&self) -> Result<SamplingParams> {
        let mut params = SamplingParams::default();
        let size = std::mem::size_of_val(&params);
        self.call(|error| unsafe {
            (self.api.tenon_sampling_params_init)(&mut params, size, error)
        })?;
        Ok(params)
    }

    /// Calls a function with a place for its error.
    fn call(&self, function: impl FnOnce(*mut sys::tenon_error) -> i32) -> Result<()> {
        let mut error = sys::tenon_error::default();
        let code = function(&mut error);
        if code == sys::TENON_OK {
            return Ok(());
        }
        let message = unsafe { CStr::from_ptr(error.message.as_ptr()) };
        Err(Error {
            code,
            message: message.to_string_lossy().into_owned(),
            name: self.status_name(code),
        })
    }
}

/// What ops run in: the threads of a CPU, or a CUDA device.
pub struct Context {
    library: Library,
    handle: sys::tenon_context,
    stream: usize,
}

impl Context {
    pub fn new(library: Library, options: &ContextOptions) -> Result<Context> {
        let mut handle = 0;
        library.call(|error| unsafe {
            (library.api.tenon_context_create)(options, &mut handle, error)
        })?;
        Ok(Context {
            library,
            handle,
            stream: 0,
        })
    }

    /// CPU ops run on the calling thread alone.
    pub fn single_threaded(library: Library) -> Context {
        Context {
            library,
            handle: 0,
            stream: 0,
        }
    }

    /// Sizes of the expert kernels on a GPU: the text of a file of tools/tune.
    /// Once for a context.
    pub fn set_moe_kernels(&self, json: &str) -> Result<()> {
        let json = c_string(json)?;
        self.library.call(|error| unsafe {
            (self.library.api.tenon_context_set_moe_kernels)(self.handle, json.as_ptr(), error)
        })
    }

    /// Makes ops run on this `cudaStream_t`.
    ///
    /// # Safety
    /// The stream outlives the context. Ops on a CUDA stream only enqueue work:
    /// tensors and workspaces must live until it is done.
    pub unsafe fn set_stream(&mut self, stream: *mut c_void) {
        self.stream = stream as usize;
    }

    fn launch<A>(&self, op: Op<A>, args: &A) -> Result<()> {
        let stream = self.stream as *mut c_void;
        self.library
            .call(|error| unsafe { op(self.handle, args, stream, error) })
    }

    fn workspace_size<A>(&self, query: Query<A>, args: &A) -> Result<u64> {
        let mut bytes = 0;
        self.library
            .call(|error| unsafe { query(self.handle, args, &mut bytes, error) })?;
        Ok(bytes)
    }
}

type Op<A> = unsafe extern "C" fn(
    context: sys::tenon_context,
    args: *const A,
    stream: *mut c_void,
    error: *mut sys::tenon_error,
) -> i32;

type Query<A> = unsafe extern "C" fn(
    context: sys::tenon_context,
    args: *const A,
    bytes: *mut u64,
    error: *mut sys::tenon_error,
) -> i32;

impl Drop for Context {
    fn drop(&mut self) {
        unsafe { (self.library.api.tenon_context_destroy)(self.handle, std::ptr::null_mut()) };
    }
}

/// A string of the library that is never freed.
fn constant(string: *const std::os::raw::c_char) -> &'static str {
    unsafe { CStr::from_ptr(string) }.to_str().unwrap_or("?")
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid_argument(format!("{:?} holds a zero byte", text)))
}
