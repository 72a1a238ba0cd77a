//! Holds a libtenon.so to the conformance vectors:
//!
//!     conformance VECTORS MODEL_DIR [LIBTENON]

mod calls;
mod vectors;

use calls::Fields;
use std::process::ExitCode;
use tenon::{sys, Context, ContextOptions, Library, LoadOptions, Logits, Model, Row};
use tenon::{SamplingParams, Sequence, Session, SessionOptions};
use vectors::{Case, TensorData};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        [vectors, model] => run(vectors, model, "libtenon.so.1"),
        [vectors, model, library] => run(vectors, model, library),
        _ => Err("usage: conformance VECTORS MODEL_DIR [LIBTENON]".to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("conformance: {}", message);
            ExitCode::FAILURE
        }
    }
}

fn run(vectors: &str, model_directory: &str, library: &str) -> Result<(), String> {
    let text = std::fs::read_to_string(vectors).map_err(|e| format!("{}: {}", vectors, e))?;
    let mut cases = vectors::parse(&text).map_err(|e| format!("{}: {}", vectors, e))?;
    // SAFETY: the file that the caller names is Tenon's library.
    let library = unsafe { Library::open(library) }.map_err(|e| e.to_string())?;
    let (major, minor) = library.abi_version();
    println!("libtenon {}, ABI {}.{}", library.version(), major, minor);

    let options = ContextOptions {
        device_type: sys::TENON_DEVICE_CPU,
        ..Default::default()
    };
    let context = Context::new(library, &options).map_err(|e| e.to_string())?;
    let ops: Vec<String> = cases.iter().map(|case| case.op.clone()).collect();
    let mut num_of_op = 0;
    for (i, case) in cases.iter_mut().enumerate() {
        let result = match case.op.as_str() {
            "generate" => check_generation(library, model_directory, case),
            _ => check_op(&context, case),
        };
        result.map_err(|e| format!("{}: {}", case.name, e))?;
        num_of_op += 1;
        if ops.get(i + 1) != Some(&ops[i]) {
            println!("{}: {} cases", ops[i], num_of_op);
            num_of_op = 0;
        }
    }
    println!("{} cases passed", cases.len());
    Ok(())
}

/// Runs the case's op and compares what it returned and what it wrote.
fn check_op(context: &Context, case: &mut Case) -> Result<(), String> {
    let result = calls::run(context, &Fields::new(case))?;
    match (&case.reject, result) {
        (None, result) => result.map_err(|e| e.to_string())?,
        (Some((code, word)), Err(e)) if e.code == *code && e.message.contains(word) => (),
        (Some((code, word)), result) => {
            return Err(format!(
                "is {:?}, expected code {} naming {}",
                result, code, word
            ))
        }
    }
    case.tensors.iter().try_for_each(TensorData::check)
}

/// Lets the model continue the case's prompt and compares every token.
fn check_generation(library: Library, directory: &str, case: &mut Case) -> Result<(), String> {
    let sampling = sampling_params(case)?;
    let prompt = tokens(case.tensor("prompt")?.memory.bytes());
    let expected = tokens(case.tensor("tokens")?.expected.bytes());
    println!("{}: {}{}", case.name, text(&prompt), text(&expected));
    for draw in [step_by_step, pipelined] {
        let actual = generate(library, directory, &prompt, &sampling, expected.len(), draw)
            .map_err(|e| e.to_string())?;
        if let Some(i) = (0..expected.len()).find(|&i| actual[i] != expected[i]) {
            return Err(format!(
                "token {} is {}, expected {}",
                i, actual[i], expected[i]
            ));
        }
    }
    Ok(())
}

/// The model's tokens are bytes; 0 begins a text.
fn text(tokens: &[i32]) -> String {
    let bytes = tokens.iter().filter(|&&token| token != 0);
    bytes.map(|&token| token as u8 as char).collect()
}

fn sampling_params(case: &mut Case) -> Result<SamplingParams, String> {
    let fields = Fields::new(case);
    Ok(SamplingParams {
        temperature: fields.number("temperature")?,
        top_k: fields.number("top_k")?,
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?,
        filter_order: fields.number("filter_order")?,
        seed: fields.number("seed")?,
        ..Default::default()
    })
}

/// Continues the prompt by `count` tokens.
fn generate(
    library: Library,
    directory: &str,
    prompt: &[i32],
    sampling: &SamplingParams,
    count: usize,
    draw: Draw,
) -> tenon::Result<Vec<i32>> {
    let model = Model::load(library, directory, LoadOptions::default())?;
    let options = SessionOptions {
        max_sequences: 1,
        ..Default::default()
    };
    let session = Session::new(&model, &options)?;
    let sequence = session.sequence()?;
    draw(&session, &sequence, prompt, sampling, count)
}

/// Draws `count` tokens after a prompt.
type Draw = fn(&Session, &Sequence, &[i32], &SamplingParams, usize) -> tenon::Result<Vec<i32>>;

fn step_by_step(
    session: &Session,
    sequence: &Sequence,
    prompt: &[i32],
    sampling: &SamplingParams,
    count: usize,
) -> tenon::Result<Vec<i32>> {
    let mut drawn: Vec<i32> = Vec::new();
    while drawn.len() < count {
        let tokens = drawn.last().map_or(prompt, std::slice::from_ref);
        let sampled = session.step(&mut [row(sequence, tokens, sampling)])?;
        drawn.push(sampled[0].token);
    }
    Ok(drawn)
}

/// With two steps in flight: tokens go from step to step without us.
fn pipelined(
    session: &Session,
    sequence: &Sequence,
    prompt: &[i32],
    sampling: &SamplingParams,
    count: usize,
) -> tenon::Result<Vec<i32>> {
    session.enqueue(&mut [row(sequence, prompt, sampling)])?;
    let mut drawn: Vec<i32> = Vec::new();
    while drawn.len() < count {
        if drawn.len() + 1 < count {
            session.enqueue(&mut [row(sequence, &[], sampling)])?;
        }
        drawn.push(session.wait()?[0].token);
    }
    Ok(drawn)
}

/// Without tokens it continues.
fn row<'a>(sequence: &'a Sequence<'a>, tokens: &'a [i32], sampling: &'a SamplingParams) -> Row<'a> {
    Row {
        sequence,
        tokens,
        continues: tokens.is_empty(),
        sampling: Some(sampling),
        logits: Logits::None,
        edits: None,
        bitmask: None,
    }
}

fn tokens(bytes: &[u8]) -> Vec<i32> {
    bytes
        .chunks_exact(4)
        .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}
