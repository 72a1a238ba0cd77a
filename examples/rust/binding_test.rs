//! What the binding adds to the C interface: ownership, slices and errors.

use tenon::ops::{RmsNorm, Sampler};
use tenon::*;

fn library() -> Library {
    unsafe { Library::open("libtenon.so.1") }.unwrap()
}

fn model_directory() -> String {
    std::env::var("MODEL_DIR").expect("MODEL_DIR: the folder of the example model")
}

fn code<T>(result: Result<T>) -> i32 {
    result.err().map_or(sys::TENON_OK, |e| e.code)
}

#[test]
fn the_library_says_what_it_is() {
    let library = library();
    assert_eq!(library.abi_version().0, sys::TENON_ABI_MAJOR);
    assert!(!library.version().is_empty());
    assert_eq!(library.status_name(sys::TENON_NOT_FOUND), "NOT_FOUND");
    assert_eq!(library.device_count(sys::TENON_DEVICE_CPU), Ok(1));
}

#[test]
fn a_file_that_is_no_library_is_refused() {
    for file in ["/nowhere/libtenon.so.1", "libc.so.6", "zero\0byte"] {
        assert!(unsafe { Library::open(file) }.is_err(), "{}", file);
    }
}

#[test]
fn a_context_takes_sizes_of_kernels_once() {
    let context = Context::new(
        library(),
        &ContextOptions {
            device_type: sys::TENON_DEVICE_CPU,
            num_threads: 1,
            ..Default::default()
        },
    )
    .unwrap();
    let invalid = context.set_moe_kernels("{}");
    assert_eq!(code(invalid), sys::TENON_INVALID_ARGUMENT);
    let none = r#"{"format": "tenon-moe-kernels-1", "device": "any", "source": "a test"}"#;
    context.set_moe_kernels(none).unwrap();
    let again = context.set_moe_kernels(none);
    assert_eq!(code(again), sys::TENON_FAILED_PRECONDITION);
}

#[test]
fn an_op_runs_on_slices_in_place_and_with_strides() {
    let context = Context::single_threaded(library());
    let mut rows = [3f32, 4.0, -1.0, 3.0, 4.0, -1.0];
    let weight = [1f32, 2.0];
    let weight = Tensor::new(&weight, &[2]).unwrap();
    let x = TensorMut::strided(&mut rows, &[2, 2], &[3, 1]).unwrap();
    let args = RmsNorm {
        x: Some(&x),
        weight: Some(&weight),
        out: Some(&x),
        epsilon: 1e-12,
        ..Default::default()
    };
    context.rms_norm(&args).unwrap();
    let rms = 12.5f32.sqrt();
    for (actual, expected) in rows.iter().zip([3.0 / rms, 8.0 / rms, -1.0].iter().cycle()) {
        assert!((actual - expected).abs() < 1e-6, "{:?}", rows);
    }
}

#[test]
fn tokens_are_sampled_from_logits() {
    let library = library();
    let context = Context::single_threaded(library);
    let params = [
        SamplingParams::default(),
        library.sampling_params().unwrap(),
    ];
    let logits = [0f32, 2.0, 1.0, -99.0, -99.0, 0.0];
    let (mut tokens, mut statuses) = ([0; 2], [0; 2]);
    let logits = Tensor::new(&logits, &[2, 3]).unwrap();
    let params = Tensor::new(sampling_bytes(&params), &[2, 128]).unwrap();
    let token_tensor = TensorMut::new(&mut tokens, &[2]).unwrap();
    let status_tensor = TensorMut::new(&mut statuses, &[2]).unwrap();
    let args = Sampler {
        logits: Some(&logits),
        params: Some(&params),
        tokens: Some(&token_tensor),
        statuses: Some(&status_tensor),
        ..Default::default()
    };
    let size = context.sampler_workspace_size(&args).unwrap();
    context.sampler(&args, &mut Workspace::new(size)).unwrap();
    assert_eq!((tokens, statuses), ([1, 2], [sys::TENON_SAMPLE_OK; 2]));
}

#[test]
fn an_error_names_what_is_wrong() {
    let context = Context::single_threaded(library());
    let error = context.rms_norm(&RmsNorm::default()).unwrap_err();
    assert_eq!(error.code, sys::TENON_INVALID_ARGUMENT);
    assert!(
        error.to_string().starts_with("INVALID_ARGUMENT: "),
        "{}",
        error
    );
    assert!(error.message.contains("rms_norm"), "{}", error);
}

#[test]
fn a_tensor_must_fit_its_slice() {
    let data = [0f32; 12];
    assert!(Tensor::new(&data, &[3, 4]).is_ok());
    assert!(Tensor::new(&data, &[3, 5]).is_err());
    assert!(Tensor::new(&data, &[0, i64::MAX, i64::MAX]).is_ok());
    assert!(Tensor::new(&data, &[i64::MAX, i64::MAX]).is_err());
    assert!(Tensor::new(&data, &[-1, 4]).is_err());
    assert!(Tensor::strided(&data, &[3, 2], &[5, 1]).is_ok());
    assert!(Tensor::strided(&data, &[3, 3], &[5, 1]).is_err());
    assert!(Tensor::strided(&data, &[3, 1], &[-5, 1]).is_err());
    assert!(Tensor::strided(&data, &[3, 2], &[5]).is_err());
}

#[test]
fn progress_can_stop_a_load() {
    let library = library();
    let mut calls = Vec::new();
    let mut progress = |done, total| {
        calls.push((done, total));
        true
    };
    let options = LoadOptions {
        progress: Some(&mut progress),
        ..Default::default()
    };
    Model::load(library, &model_directory(), options).unwrap();
    let &(done, total) = calls.last().unwrap();
    assert_eq!(done, total);

    let mut stop = |_, _| false;
    let options = LoadOptions {
        progress: Some(&mut stop),
        ..Default::default()
    };
    let stopped = Model::load(library, &model_directory(), options);
    assert_eq!(code(stopped), sys::TENON_CANCELLED);
}

#[test]
fn a_model_that_is_not_there_is_not_found() {
    let missing = Model::load(library(), "/nowhere", LoadOptions::default());
    assert_eq!(code(missing), sys::TENON_NOT_FOUND);
}

#[test]
fn sequences_fork_truncate_and_give_logits() {
    let library = library();
    let model = Model::load(library, &model_directory(), LoadOptions::default()).unwrap();
    let vocab_size = model.info().unwrap().vocab_size as usize;
    let options = SessionOptions {
        max_sequences: 2,
        max_logit_rows: 8,
        ..Default::default()
    };
    let session = Session::new(&model, &options).unwrap();
    drop(model); // the session keeps what it needs
    let greedy = SamplingParams::default();
    let prompt: Vec<i32> = b"She was".iter().map(|&byte| byte.into()).collect();

    let first = session.sequence().unwrap();
    let mut all = vec![0f32; prompt.len() * vocab_size];
    let drawn = session.step(&mut [Row {
        sequence: &first,
        tokens: &prompt,
        continues: false,
        sampling: Some(&greedy),
        logits: Logits::All(&mut all),
        edits: None,
        bitmask: None,
    }]);
    let drawn = drawn.unwrap().remove(0);
    assert_eq!(drawn.status, sys::TENON_SAMPLE_OK);
    let last = &all[all.len() - vocab_size..];
    assert!(last
        .iter()
        .all(|&logit| logit <= last[drawn.token as usize]));

    let second = first.fork().unwrap();
    assert_eq!(code(session.sequence()), sys::TENON_RESOURCE_EXHAUSTED);
    second.truncate(prompt.len() - 1).unwrap();
    assert_eq!(second.num_tokens(), Ok(prompt.len() - 1));
    let mut logits = vec![0f32; vocab_size];
    let again = session.step(&mut [Row {
        sequence: &second,
        tokens: &prompt[prompt.len() - 1..],
        continues: false,
        sampling: Some(&greedy),
        logits: Logits::Last(&mut logits),
        edits: None,
        bitmask: None,
    }]);
    let again = again.unwrap().remove(0);
    assert_eq!(again.token, drawn.token);
    assert!(again.logits.is_empty());

    second.truncate(prompt.len() - 2).unwrap();
    let both = session.step(&mut [Row {
        sequence: &second,
        tokens: &prompt[prompt.len() - 2..],
        continues: false,
        sampling: Some(&greedy),
        logits: Logits::ReturnAll,
        edits: None,
        bitmask: None,
    }]);
    assert_eq!(both.unwrap()[0].logits, all[all.len() - 2 * vocab_size..]);

    let wrong = session.step(&mut [Row {
        sequence: &second,
        tokens: &[0],
        continues: false,
        sampling: None,
        logits: Logits::Last(&mut logits[1..]),
        edits: None,
        bitmask: None,
    }]);
    assert_eq!(code(wrong), sys::TENON_INVALID_ARGUMENT);
    drop(second);
    assert_eq!(session.info().unwrap().num_sequences, 1);
}

/// Draws the token after the prompt, in a step behind a row that has nothing else.
fn draw(
    session: &Session,
    sampling: &SamplingParams,
    edits: Option<&[LogitEdit]>,
    bitmask: Option<&[u32]>,
) -> Result<Vec<Sampled>> {
    let prompt: Vec<i32> = b"She was".iter().map(|&byte| byte.into()).collect();
    let sequences = [session.sequence()?, session.sequence()?];
    let row = |i: usize| Row {
        sequence: &sequences[i],
        tokens: &prompt,
        continues: false,
        sampling: Some(sampling),
        logits: Logits::None,
        edits,
        bitmask,
    };
    let greedy = SamplingParams::default();
    let plain = Row {
        sampling: Some(&greedy),
        edits: None,
        bitmask: None,
        ..row(0)
    };
    session.step(&mut [plain, row(1)])
}

#[test]
fn rows_have_edits_bitmasks_and_best_tokens() {
    let model = Model::load(library(), &model_directory(), LoadOptions::default()).unwrap();
    let vocab_size = model.info().unwrap().vocab_size as usize;
    let options = SessionOptions {
        flags: sys::TENON_SESSION_LOGIT_BITMASKS,
        max_logit_edits: 3,
        max_top_logprobs: 3,
        ..Default::default()
    };
    let session = Session::new(&model, &options).unwrap();
    let mut sampling = SamplingParams {
        num_top_logprobs: 3,
        ..Default::default()
    };
    let rows = draw(&session, &sampling, None, None).unwrap();
    let top = &rows[1].top;
    let tokens: Vec<i32> = top.iter().map(|&(token, _)| token).collect();
    assert_eq!((tokens[0], tokens.len()), (rows[1].token, 3));
    assert!((top[0].1 - rows[1].logprob).abs() < 1e-4, "{:?}", rows);
    assert!(top[0].1 >= top[1].1 && top[1].1 >= top[2].1, "{:?}", rows);
    let plain = rows[0].clone();
    assert_eq!((plain.token, plain.top.len()), (tokens[0], 0));

    let expect = |sampling: &SamplingParams,
                  edits: Option<&[LogitEdit]>,
                  bitmask: Option<&[u32]>,
                  token: i32,
                  best: &[i32]| {
        let rows = draw(&session, sampling, edits, bitmask).unwrap();
        assert_eq!(rows[0], plain);
        assert_eq!(rows[1].token, token);
        let top: Vec<i32> = rows[1].top.iter().map(|&(token, _)| token).collect();
        assert_eq!(top[..best.len()], best[..], "{:?}", rows);
    };
    let edit = |id, state, bias, offset| LogitEdit {
        id,
        state,
        bias,
        offset,
    };
    let ban = |id| edit(id, sys::TENON_EDIT_BAN, 0.0, 0.0);
    // In any order.
    for bans in [[0, 1], [1, 0]].map(|order| order.map(|i| ban(tokens[i]))) {
        expect(&sampling, Some(&bans), None, tokens[2], &tokens[2..]);
    }
    expect(&sampling, Some(&[edit(7, 0, 100.0, 0.0)]), None, 7, &[7]);
    expect(&sampling, Some(&[edit(8, 0, 0.0, 100.0)]), None, 8, &[8]);
    let mut bitmask = vec![0u32; (vocab_size + 31) / 32];
    for token in &tokens[1..] {
        bitmask[*token as usize / 32] |= 1 << (token % 32);
    }
    expect(&sampling, None, Some(&bitmask), tokens[1], &tokens[1..]);
    let rows = draw(&session, &sampling, Some(&[ban(tokens[1])]), Some(&bitmask));
    let only = rows.unwrap().remove(1);
    assert_eq!((only.token, only.top.len()), (tokens[2], 1));

    let refused =
        |sampling: &SamplingParams, edits: Option<&[LogitEdit]>, bitmask: Option<&[u32]>| {
            code(draw(&session, sampling, edits, bitmask))
        };
    let short = refused(&sampling, None, Some(&bitmask[1..]));
    assert_eq!(short, sys::TENON_INVALID_ARGUMENT);
    let twice = refused(&sampling, Some(&[ban(1), ban(1)]), None);
    assert_eq!(twice, sys::TENON_INVALID_ARGUMENT);
    let many = refused(&sampling, Some(&[0, 1, 2, 3].map(ban)), None);
    assert_eq!(many, sys::TENON_RESOURCE_EXHAUSTED);
    sampling.presence_penalty = 1.0;
    let without = refused(&sampling, None, None);
    assert_eq!(without, sys::TENON_INVALID_ARGUMENT);
    expect(&sampling, Some(&[]), None, tokens[0], &tokens);
    for count in [-1, 4, 1 << 30] {
        sampling.num_top_logprobs = count;
        let refused = refused(&sampling, Some(&[]), None);
        assert_eq!(refused, sys::TENON_INVALID_ARGUMENT);
    }
}

#[test]
fn two_steps_are_in_flight() {
    let model = Model::load(library(), &model_directory(), LoadOptions::default()).unwrap();
    let options = SessionOptions {
        max_top_logprobs: 2,
        ..Default::default()
    };
    let session = Session::new(&model, &options).unwrap();
    let sampling = SamplingParams {
        temperature: 0.9,
        top_p: 1.0,
        seed: 3,
        mirostat_tau: 3.0,
        mirostat_eta: 0.2,
        num_top_logprobs: 2,
        ..Default::default()
    };
    let prompt: Vec<i32> = b"She was".iter().map(|&byte| byte.into()).collect();
    fn next<'a>(
        sequence: &'a Sequence<'a>,
        tokens: &'a [i32],
        sampling: &'a SamplingParams,
    ) -> Row<'a> {
        Row {
            sequence,
            tokens,
            continues: tokens.is_empty(),
            sampling: Some(sampling),
            logits: Logits::ReturnLast,
            edits: None,
            bitmask: None,
        }
    }
    let first = session.sequence().unwrap();
    let mut expected: Vec<Sampled> = Vec::new();
    for i in 0..5 {
        let tokens = if i == 0 { &prompt[..] } else { &[] };
        expected.extend(
            session
                .step(&mut [next(&first, tokens, &sampling)])
                .unwrap(),
        );
    }
    assert_ne!(expected[0].mirostat_mu, expected[1].mirostat_mu);
    assert_eq!(expected[0].top.len(), 2);
    let vocab_size = model.info().unwrap().vocab_size as usize;
    assert_eq!(expected[4].logits.len(), vocab_size);
    assert_ne!(expected[3].logits, expected[4].logits);

    let second = session.sequence().unwrap();
    session
        .enqueue(&mut [next(&second, &prompt, &sampling)])
        .unwrap();
    let mut sampled = Vec::new();
    for _ in 0..4 {
        session
            .enqueue(&mut [next(&second, &[], &sampling)])
            .unwrap();
        let third = session.enqueue(&mut [next(&second, &[], &sampling)]);
        assert_eq!(code(third), sys::TENON_FAILED_PRECONDITION);
        sampled.extend(session.wait().unwrap());
    }
    let meanwhile = session.step(&mut [next(&second, &[], &sampling)]);
    assert_eq!(code(meanwhile), sys::TENON_FAILED_PRECONDITION);
    drop(second); // it has ended; its last step may go on
    sampled.extend(session.wait().unwrap());
    assert_eq!(sampled, expected);
    assert_eq!(code(session.wait()), sys::TENON_FAILED_PRECONDITION);

    // Slices of the caller's might be gone before they are written.
    let mut logits = vec![0.0; vocab_size];
    let mut row = next(&first, &[], &sampling);
    row.logits = Logits::Last(&mut logits);
    assert_eq!(
        code(session.enqueue(&mut [row])),
        sys::TENON_INVALID_ARGUMENT
    );

    // Back to where two tokens had been drawn.
    first.truncate(prompt.len() + 1).unwrap();
    let set = SamplingParams {
        flags: sys::TENON_SAMPLING_SET_MIROSTAT_MU,
        mirostat_mu: expected[1].mirostat_mu,
        ..sampling
    };
    let again = session.step(&mut [next(&first, &[expected[1].token], &set)]);
    assert_eq!(again.unwrap()[0], expected[2]);
    session
        .enqueue(&mut [next(&first, &[], &sampling)])
        .unwrap(); // ends with the session
}

#[test]
fn threads_share_a_session() {
    let library = library();
    let model = Model::load(library, &model_directory(), LoadOptions::default()).unwrap();
    let session = Session::new(&model, &SessionOptions::default()).unwrap();
    let greedy = SamplingParams::default();
    let generate = || {
        let sequence = session.sequence().unwrap();
        let mut tokens = vec![i32::from(b'S')];
        for _ in 0..5 {
            let sampled = session.step(&mut [Row {
                sequence: &sequence,
                tokens: &tokens[tokens.len() - 1..],
                continues: false,
                sampling: Some(&greedy),
                logits: Logits::None,
                edits: None,
                bitmask: None,
            }]);
            tokens.push(sampled.unwrap()[0].token);
        }
        tokens
    };
    let expected = generate();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(generate)).collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), expected);
        }
    });
}
