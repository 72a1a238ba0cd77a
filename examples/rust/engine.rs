//! Models, and sessions that run them.

use crate::{c_string, sys, Error, Library, LogitEdit, Result, SamplingParams, SessionOptions};
use std::collections::VecDeque;
use std::ffi::{c_void, CStr};
use std::mem::take;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr::{null, null_mut};
use std::sync::Mutex;

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
    /// The logits of the rows of each step in flight, which the library writes, the
    /// oldest step first.
    in_flight: Mutex<VecDeque<Vec<Vec<f32>>>>,
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
            in_flight: Mutex::default(),
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
        let mut space: Vec<_> = rows.iter().map(|_| RowSpace::default()).collect();
        let raw_rows = rows
            .iter_mut()
            .zip(&mut space)
            .map(|(row, space)| {
                let raw = row.raw(self, space)?;
                Ok(sys::tenon_step_row {
                    top_tokens: space.top_tokens.as_mut_ptr(),
                    top_logprobs: space.top_logprobs.as_mut_ptr(),
                    ..raw
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut tokens = vec![0; rows.len()];
        let mut logprobs = vec![0.0; rows.len()];
        let mut statuses = vec![0; rows.len()];
        let mut mirostat_mu = vec![0.0; rows.len()];
        let args = sys::tenon_step_args {
            num_rows: length(rows.len())?,
            rows: raw_rows.as_ptr(),
            tokens: tokens.as_mut_ptr(),
            logprobs: logprobs.as_mut_ptr(),
            statuses: statuses.as_mut_ptr(),
            mirostat_mu: mirostat_mu.as_mut_ptr(),
            ..Default::default()
        };
        self.library.call(|error| unsafe {
            (self.library.api.tenon_session_step)(self.handle, &args, error)
        })?;
        Ok((0..rows.len())
            .map(|i| Sampled {
                token: tokens[i],
                logprob: logprobs[i],
                status: statuses[i],
                top: space[i].top(&rows[i]),
                mirostat_mu: mirostat_mu[i],
                logits: take(&mut space[i].logits),
            })
            .collect())
    }

    /// Starts a step, or does nothing at all: `step` in two parts, so that a step is
    /// on its way before the tokens of the last one are read. Two may be in flight;
    /// `wait` gives the results of the first. Sequences may come and go meanwhile:
    /// one that has ended may be dropped at once though its next step is under way.
    /// Logits are written after this call, so its rows can have none but those that
    /// are returned (`Logits::ReturnLast`, `Logits::ReturnAll`).
    pub fn enqueue(&self, rows: &mut [Row]) -> Result<()> {
        if rows
            .iter()
            .any(|row| matches!(row.logits, Logits::Last(_) | Logits::All(_)))
        {
            let message = "an enqueued row with logits that are not returned".to_string();
            return Err(Error::invalid_argument(message));
        }
        let mut space: Vec<_> = rows.iter().map(|_| RowSpace::default()).collect();
        let raw_rows = rows
            .iter_mut()
            .zip(&mut space)
            .map(|(row, space)| row.raw(self, space))
            .collect::<Result<Vec<_>>>()?;
        let args = sys::tenon_step_args {
            num_rows: length(rows.len())?,
            rows: raw_rows.as_ptr(),
            ..Default::default()
        };
        let mut in_flight = self.in_flight.lock().unwrap();
        self.library.call(|error| unsafe {
            (self.library.api.tenon_session_enqueue_step)(self.handle, &args, error)
        })?;
        in_flight.push_back(space.into_iter().map(|row| row.logits).collect());
        Ok(())
    }

    /// Waits for the step that was enqueued first.
    pub fn wait(&self) -> Result<Vec<Sampled>> {
        let mut in_flight = self.in_flight.lock().unwrap();
        let rows = in_flight.front().map_or(0, Vec::len);
        let mut tokens = vec![0; rows];
        let mut logprobs = vec![0.0; rows];
        let mut statuses = vec![0; rows];
        let mut mirostat_mu = vec![0.0; rows];
        let mut top_tokens = vec![[0; MAX_TOP]; rows];
        let mut top_logprobs = vec![[0.0; MAX_TOP]; rows];
        let results = sys::tenon_step_results {
            num_rows: length(rows)?,
            tokens: tokens.as_mut_ptr(),
            logprobs: logprobs.as_mut_ptr(),
            statuses: statuses.as_mut_ptr(),
            mirostat_mu: mirostat_mu.as_mut_ptr(),
            top_tokens: top_tokens.as_mut_ptr() as *mut i32,
            top_logprobs: top_logprobs.as_mut_ptr() as *mut f32,
            top_columns: length(MAX_TOP)?,
            ..Default::default()
        };
        self.library.call(|error| unsafe {
            (self.library.api.tenon_session_wait_step)(self.handle, &results, error)
        })?;
        let logits = in_flight.pop_front().unwrap_or_default();
        Ok(logits
            .into_iter()
            .enumerate()
            .map(|(i, logits)| Sampled {
                token: tokens[i],
                logprob: logprobs[i],
                status: statuses[i],
                top: top_of(&top_tokens[i], &top_logprobs[i]),
                mirostat_mu: mirostat_mu[i],
                logits,
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
    /// Those of the last token, in `Sampled::logits`.
    ReturnLast,
    /// Those of every token, in `Sampled::logits`.
    ReturnAll,
}

/// What a step does with one sequence.
pub struct Row<'a> {
    pub sequence: &'a Sequence<'a>,
    pub tokens: &'a [i32],
    /// In place of `tokens`, the token that the step before, waited for or not, drew
    /// for the sequence.
    pub continues: bool,
    /// None: no token is drawn, for a chunk with more of the prompt to come.
    pub sampling: Option<&'a SamplingParams>,
    pub logits: Logits<'a>,
    /// Of the logits that the next token is drawn from, in any order; `state` has
    /// `sys::TENON_EDIT_*`. Penalties need edits, though there may be none of them:
    /// `Some(&[])`. See `SessionOptions::max_logit_edits`.
    pub edits: Option<&'a [LogitEdit]>,
    /// A bit for each token, that of token 0 the lowest of the first word: 1 where
    /// it may be drawn. See `sys::TENON_SESSION_LOGIT_BITMASKS`.
    pub bitmask: Option<&'a [u32]>,
}

/// The library's limit, which a row's parameters cannot exceed.
const MAX_TOP: usize = sys::TENON_MAX_TOP_LOGPROBS as usize;

/// Edits where the library wants them.
#[derive(Clone, Copy, Default)]
#[repr(C, align(16))]
struct AlignedEdit(LogitEdit);

/// Memory of a row for the length of a step.
#[derive(Default)]
struct RowSpace {
    edits: Vec<AlignedEdit>,
    logits: Vec<f32>, // that are returned
    top_tokens: [i32; MAX_TOP],
    top_logprobs: [f32; MAX_TOP],
}

impl RowSpace {
    fn edits(&mut self, session: &Session, edits: &[LogitEdit]) -> Result<*const LogitEdit> {
        // Elements of 16 bytes either way, so they lie as in a slice of LogitEdit.
        self.edits = edits.iter().map(|&edit| AlignedEdit(edit)).collect();
        let first = self.edits.as_mut_ptr() as *mut LogitEdit;
        let (count, vocab_size) = (edits.len() as i64, session.vocab_size as i64);
        session.library.call(|error| unsafe {
            (session.library.api.tenon_logit_edits_sort)(first, count, vocab_size, error)
        })?;
        Ok(first)
    }

    fn top(&self, row: &Row) -> Vec<(i32, f32)> {
        let count = row.sampling.map_or(0, |s| s.num_top_logprobs as usize);
        top_of(&self.top_tokens[..count], &self.top_logprobs)
    }
}

/// Those that there are, each with its logprob.
fn top_of(tokens: &[i32], logprobs: &[f32]) -> Vec<(i32, f32)> {
    let top = tokens.iter().copied().zip(logprobs.iter().copied());
    top.filter(|&(token, _)| token >= 0).collect()
}

impl Row<'_> {
    fn raw(&mut self, session: &Session, space: &mut RowSpace) -> Result<sys::tenon_step_row> {
        let vocab_size = session.vocab_size;
        let num_tokens = self.tokens.len() + usize::from(self.continues);
        let (wanted, logits_mode) = match self.logits {
            Logits::None => (0, sys::TENON_LOGITS_NONE),
            Logits::Last(_) | Logits::ReturnLast => (1, sys::TENON_LOGITS_LAST),
            Logits::All(_) | Logits::ReturnAll => (num_tokens, sys::TENON_LOGITS_ALL),
        };
        let logits: &mut [f32] = match &mut self.logits {
            Logits::Last(slice) | Logits::All(slice) => slice,
            Logits::None | Logits::ReturnLast | Logits::ReturnAll => {
                space.logits = vec![0.0; wanted * vocab_size];
                &mut space.logits
            }
        };
        if logits.len() != wanted * vocab_size {
            return Err(Error::invalid_argument(format!(
                "room for {} logits, expected {} * {}",
                logits.len(),
                wanted,
                vocab_size
            )));
        }
        let logits = match logits_mode {
            sys::TENON_LOGITS_NONE => null_mut(),
            _ => logits.as_mut_ptr(),
        };
        let words = (vocab_size + 31) / 32;
        if self.bitmask.map_or(false, |bitmask| bitmask.len() != words) {
            return Err(Error::invalid_argument(format!(
                "a bitmask that has not {} words",
                words
            )));
        }
        let edits = match self.edits {
            Some(edits) => space.edits(session, edits)?,
            None => null(),
        };
        Ok(sys::tenon_step_row {
            num_tokens: length(num_tokens)?,
            flags: sys::TENON_ROW_CONTINUES * u32::from(self.continues),
            sequence: self.sequence.handle,
            tokens: match self.tokens {
                [] => null(),
                tokens => tokens.as_ptr(),
            },
            sampling: self.sampling.map_or(null(), |s| s),
            logits,
            logits_mode,
            edits,
            num_edits: length(self.edits.map_or(0, <[_]>::len))?,
            bitmask: self.bitmask.map_or(null(), <[_]>::as_ptr),
            ..Default::default()
        })
    }
}

/// The token that a step drew for a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// -1: none.
    pub token: i32,
    pub logprob: f32,
    /// One of `sys::TENON_SAMPLE_*`.
    pub status: i32,
    /// The best tokens and their logprobs, best first: `num_top_logprobs` of them,
    /// or as many as may be drawn. See `SessionOptions::max_top_logprobs`.
    pub top: Vec<(i32, f32)>,
    /// Mirostat's mu after the draw; 0 without mirostat. A row that goes on from here
    /// after `truncate` gives it, with `sys::TENON_SAMPLING_SET_MIROSTAT_MU`.
    pub mirostat_mu: f32,
    /// Those of a row with `Logits::ReturnLast` or `Logits::ReturnAll`.
    pub logits: Vec<f32>,
}

fn length(number: usize) -> Result<i32> {
    i32::try_from(number).map_err(|_| Error::invalid_argument(format!("{} is too many", number)))
}
