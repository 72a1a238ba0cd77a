//! Models, and sessions that run them.

use crate::{c_string, sys, Error, Library, Result, SamplingParams, SessionOptions};
use std::ffi::{c_void, CStr};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr::{null, null_mut};

/// Where and how a model is loaded; the default is the CPU.
pub struct LoadOptions<'a> {
    pub device_type: i32,
    pub device_index: i32,
    pub rank: i32,
    pub world_size: i32,
    /// `sys::TENON_WEIGHTS_FP8` quantises weights while they are loaded.
    pub weights: i32,
    /// Is told the bytes done and in total now and then; false stops the load.
    pub progress: Option<&'a mut dyn FnMut(i64, i64) -> bool>,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        LoadOptions {
            device_type: sys::TENON_DEVICE_CPU,
            device_index: 0,
            rank: 0,
            world_size: 1,
            weights: sys::TENON_WEIGHTS_STORED,
            progress: None,
        }
    }
}

type Progress<'a> = &'a mut dyn FnMut(i64, i64) -> bool;

/// Hands the library's call to the closure that `user_data` points to. A panic
/// must not cross C: it stops the load.
unsafe extern "C" fn on_progress(user_data: *mut c_void, done: i64, total: i64) -> i32 {
    let progress = &mut *(user_data as *mut Progress);
    let go_on = catch_unwind(AssertUnwindSafe(|| progress(done, total)));
    i32::from(!go_on.unwrap_or(false))
}

/// The weights of a model, on a device.
pub struct Model {
    library: Library,
    handle: sys::tenon_model,
}

impl Model {
    /// Loads a checkpoint: a directory of config.json and safetensors.
    pub fn load(library: Library, directory: &str, options: LoadOptions) -> Result<Model> {
        let directory = c_string(directory)?;
        let mut progress = options.progress;
        let mut args = sys::tenon_model_load_args {
            device_type: options.device_type,
            device_index: options.device_index,
            rank: options.rank,
            world_size: options.world_size,
            weights: options.weights,
            directory: directory.as_ptr(),
            ..Default::default()
        };
        if let Some(closure) = progress.as_mut() {
            args.progress = Some(on_progress);
            args.progress_user_data = closure as *mut Progress as *mut c_void;
        }
        let mut handle = 0;
        library
            .call(|error| unsafe { (library.api.tenon_model_load)(&args, &mut handle, error) })?;
        Ok(Model { library, handle })
    }

    pub fn info(&self) -> Result<sys::tenon_model_info> {
        let mut info = sys::tenon_model_info::default();
        self.library.call(|error| unsafe {
            (self.library.api.tenon_model_query)(self.handle, &mut info, error)
        })?;
        Ok(info)
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        unsafe { (self.library.api.tenon_model_destroy)(self.handle, null_mut()) };
    }
}

/// Runs a model. Threads may share one; their calls take turns.
pub struct Session {
    library: Library,
    handle: sys::tenon_session,
    vocab_size: usize,
}

impl Session {
    /// The session keeps what it needs of the model.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Session> {
        Session::create(model, options, None)
    }

    /// With sizes of the expert kernels: the text of a file of tools/tune.
    pub fn with_moe_kernels(
        model: &Model,
        options: &SessionOptions,
        json: &str,
    ) -> Result<Session> {
        Session::create(model, options, Some(&c_string(json)?))
    }

    fn create(model: &Model, options: &SessionOptions, json: Option<&CStr>) -> Result<Session> {
        let library = model.library;
        let vocab_size = model.info()?.vocab_size as usize;
        let options = SessionOptions {
            moe_kernels_json: json.map_or(null(), CStr::as_ptr),
            ..*options
        };
        let mut handle = 0;
        library.call(|error| unsafe {
            (library.api.tenon_session_create)(model.handle, &options, &mut handle, error)
        })?;
        Ok(Session {
            library,
            handle,
            vocab_size,
        })
    }

    pub fn info(&self) -> Result<sys::tenon_session_info> {
        let mut info = sys::tenon_session_info::default();
        self.library.call(|error| unsafe {
            (self.library.api.tenon_session_query)(self.handle, &mut info, error)
        })?;
        Ok(info)
    }

    /// An empty sequence.
    pub fn sequence(&self) -> Result<Sequence<'_>> {
        let mut handle = 0;
        self.library.call(|error| unsafe {
            (self.library.api.tenon_sequence_create)(self.handle, &mut handle, error)
        })?;
        Ok(Sequence {
            session: self,
            handle,
        })
    }

    /// Appends each row's tokens to its sequence and draws the next ones, in one
    /// pass over the model. After an error every sequence is as it was.
    pub fn step(&self, rows: &mut [Row]) -> Result<Vec<Sampled>> {
        let raw_rows = rows
            .iter_mut()
            .map(|row| row.raw(self.vocab_size))
            .collect::<Result<Vec<_>>>()?;
        let mut tokens = vec![0; rows.len()];
        let mut logprobs = vec![0.0; rows.len()];
        let mut statuses = vec![0; rows.len()];
        let args = sys::tenon_step_args {
            num_rows: length(rows.len())?,
            rows: raw_rows.as_ptr(),
            tokens: tokens.as_mut_ptr(),
            logprobs: logprobs.as_mut_ptr(),
            statuses: statuses.as_mut_ptr(),
            ..Default::default()
        };
        self.library.call(|error| unsafe {
            (self.library.api.tenon_session_step)(self.handle, &args, error)
        })?;
        let results = tokens.into_iter().zip(logprobs).zip(statuses);
        Ok(results
            .map(|((token, logprob), status)| Sampled {
                token,
                logprob,
                status,
            })
            .collect())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        unsafe { (self.library.api.tenon_session_destroy)(self.handle, null_mut()) };
    }
}

/// Tokens that a session has processed.
pub struct Sequence<'a> {
    session: &'a Session,
    handle: sys::tenon_sequence,
}

impl<'a> Sequence<'a> {
    /// A second sequence with the same tokens so far.
    pub fn fork(&self) -> Result<Sequence<'a>> {
        let mut handle = 0;
        self.session.library.call(|error| unsafe {
            let api = self.session.library.api;
            (api.tenon_sequence_fork)(self.session.handle, self.handle, &mut handle, error)
        })?;
        Ok(Sequence {
            session: self.session,
            handle,
        })
    }

    /// Forgets all tokens but the first `num_tokens`.
    pub fn truncate(&self, num_tokens: usize) -> Result<()> {
        let num_tokens = length(num_tokens)?;
        self.session.library.call(|error| unsafe {
            let api = self.session.library.api;
            (api.tenon_sequence_truncate)(self.session.handle, self.handle, num_tokens, error)
        })
    }

    pub fn num_tokens(&self) -> Result<usize> {
        let mut num_tokens = 0;
        self.session.library.call(|error| unsafe {
            let api = self.session.library.api;
            (api.tenon_sequence_length)(self.session.handle, self.handle, &mut num_tokens, error)
        })?;
        Ok(num_tokens as usize)
    }
}

impl Drop for Sequence<'_> {
    fn drop(&mut self) {
        let api = self.session.library.api;
        unsafe { (api.tenon_sequence_release)(self.session.handle, self.handle, null_mut()) };
    }
}

/// Where the logits of a row go.
pub enum Logits<'a> {
    None,
    /// Of the last token: vocab_size of them.
    Last(&'a mut [f32]),
    /// Of every token.
    All(&'a mut [f32]),
}

/// What a step does with one sequence.
pub struct Row<'a> {
    pub sequence: &'a Sequence<'a>,
    pub tokens: &'a [i32],
    /// None: no token is drawn, for a chunk with more of the prompt to come.
    pub sampling: Option<&'a SamplingParams>,
    pub logits: Logits<'a>,
}

impl Row<'_> {
    fn raw(&mut self, vocab_size: usize) -> Result<sys::tenon_step_row> {
        let (logits, wanted, logits_mode) = match &mut self.logits {
            Logits::None => (None, 0, sys::TENON_LOGITS_NONE),
            Logits::Last(slice) => (Some(slice), 1, sys::TENON_LOGITS_LAST),
            Logits::All(slice) => (Some(slice), self.tokens.len(), sys::TENON_LOGITS_ALL),
        };
        let space = logits.as_ref().map_or(0, |slice| slice.len());
        if space != wanted * vocab_size {
            return Err(Error::invalid_argument(format!(
                "room for {} logits, expected {} * {}",
                space, wanted, vocab_size
            )));
        }
        Ok(sys::tenon_step_row {
            num_tokens: length(self.tokens.len())?,
            sequence: self.sequence.handle,
            tokens: self.tokens.as_ptr(),
            sampling: self.sampling.map_or(null(), |s| s),
            logits: logits.map_or(null_mut(), |slice| slice.as_mut_ptr()),
            logits_mode,
            ..Default::default()
        })
    }
}

/// The token that a step drew for a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// -1: none.
    pub token: i32,
    pub logprob: f32,
    /// One of `sys::TENON_SAMPLE_*`.
    pub status: i32,
}

fn length(number: usize) -> Result<i32> {
    i32::try_from(number).map_err(|_| Error::invalid_argument(format!("{} is too many", number)))
}
