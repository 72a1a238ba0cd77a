//! What a call costs: rms_norm without rows, with all its checks.
//!
//!     overhead [LIBTENON]

use std::time::Instant;
use tenon::ops::RmsNorm;
use tenon::{Context, Library, Tensor, TensorMut};

fn main() -> tenon::Result<()> {
    let file = std::env::args().nth(1);
    // SAFETY: the file that the caller names is Tenon's library.
    let library = unsafe { Library::open(file.as_deref().unwrap_or("libtenon.so.1"))? };
    let context = Context::single_threaded(library);
    let (x, weight, mut out) = ([0f32; 0], [1f32; 64], [0f32; 0]);
    let x = Tensor::new(&x, &[0, 64])?;
    let weight = Tensor::new(&weight, &[64])?;
    let out = TensorMut::new(&mut out, &[0, 64])?;
    let args = RmsNorm {
        x: Some(&x),
        weight: Some(&weight),
        out: Some(&out),
        epsilon: 1e-6,
        ..Default::default()
    };
    const CALLS: u32 = 1_000_000;
    let mut nanoseconds: Vec<f64> = Vec::new();
    for _ in 0..9 {
        let start = Instant::now();
        for _ in 0..CALLS {
            context.rms_norm(&args)?;
        }
        nanoseconds.push(start.elapsed().as_nanos() as f64 / f64::from(CALLS));
    }
    nanoseconds.sort_by(f64::total_cmp);
    println!("{:.1} ns per call (median of 9)", nanoseconds[4]);
    Ok(())
}
