//! Reads the conformance vectors; tests/abi/conformance/README.md has the format.

use std::collections::HashMap;
use std::str::{FromStr, SplitWhitespace};
use tenon::DType;

pub struct Case {
    pub name: String,
    pub op: String,
    pub args: HashMap<String, String>,
    pub tensors: Vec<TensorData>,
    /// The status code that the call must fail with, and a word of its message.
    pub reject: Option<(i32, String)>,
}

pub struct TensorData {
    pub field: String,
    pub dtype: DType,
    pub shape: Vec<i64>,
    pub strides: Option<Vec<i64>>,
    pub byte_offset: u64,
    pub memory: Memory,
    pub expected: Memory,
    pub ulps: i64,
}

/// Bytes, aligned to 8.
#[derive(Clone)]
pub struct Memory {
    words: Vec<u64>,
    size: usize,
}

impl Memory {
    fn new(bytes: &[u8]) -> Memory {
        let words = bytes.chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_ne_bytes(word)
        });
        Memory {
            words: words.collect(),
            size: bytes.len(),
        }
    }

    pub fn pointer(&mut self) -> *mut u8 {
        self.words.as_mut_ptr().cast()
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the words hold at least so many bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.size) }
    }
}

/// All cases of a file, or what is wrong with it and where.
pub fn parse(text: &str) -> Result<Vec<Case>, String> {
    let mut cases = Vec::new();
    let mut open: Option<Case> = None;
    for (index, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split_whitespace();
        let statement = word(&mut words)?;
        let result = match (statement, open.as_mut()) {
            ("case", None) => Case::new(&mut words).map(|case| open = Some(case)),
            ("end", Some(_)) => {
                cases.extend(open.take());
                Ok(())
            }
            (_, Some(case)) => case.add(statement, &mut words),
            _ => Err("outside of a case".to_string()),
        };
        result.map_err(|what| format!("line {}: {}", index + 1, what))?;
    }
    match open {
        None => Ok(cases),
        Some(case) => Err(format!("case {} has no end", case.name)),
    }
}

impl Case {
    fn new(words: &mut SplitWhitespace) -> Result<Case, String> {
        Ok(Case {
            name: word(words)?.to_string(),
            op: word(words)?.to_string(),
            args: HashMap::new(),
            tensors: Vec::new(),
            reject: None,
        })
    }

    pub fn tensor(&self, field: &str) -> Result<&TensorData, String> {
        let tensor = self.tensors.iter().find(|t| t.field == field);
        tensor.ok_or_else(|| format!("has no tensor {}", field))
    }

    fn add(&mut self, statement: &str, words: &mut SplitWhitespace) -> Result<(), String> {
        match statement {
            "arg" => {
                let field = word(words)?.to_string();
                self.args.insert(field, word(words)?.to_string());
            }
            "tensor" => self.tensors.push(TensorData::new(words)?),
            "expect" => {
                let field = word(words)?;
                let tensor = self.tensors.iter_mut().find(|t| t.field == field);
                let tensor = tensor.ok_or_else(|| format!("no tensor {}", field))?;
                tensor.ulps = number(word(words)?)?;
                tensor.expected = Memory::new(&hex(word(words)?)?);
                if tensor.expected.size != tensor.memory.size {
                    return Err(format!("{} has another size", field));
                }
            }
            "reject" => self.reject = Some((number(word(words)?)?, word(words)?.to_string())),
            _ => return Err(format!("unknown statement {}", statement)),
        }
        Ok(())
    }
}

impl TensorData {
    fn new(words: &mut SplitWhitespace) -> Result<TensorData, String> {
        let field = word(words)?.to_string();
        let dtype = dtype(word(words)?)?;
        let shape = list(word(words)?)?;
        let strides = match word(words)? {
            "-" => None,
            strides => Some(list(strides)?),
        };
        let byte_offset = number(word(words)?)?;
        let memory = Memory::new(&hex(word(words)?)?);
        Ok(TensorData {
            field,
            dtype,
            shape,
            strides,
            byte_offset,
            // Without an expect, the tensor must stay as it is.
            expected: memory.clone(),
            memory,
            ulps: 0,
        })
    }

    /// Compares the memory with what is expected.
    pub fn check(&self) -> Result<(), String> {
        let width = self.dtype.bits as usize / 8;
        let actual = self.memory.bytes();
        let expected = self.expected.bytes();
        let mut near = vec![false; actual.len()];
        if self.ulps > 0 {
            for start in self.element_offsets(width) {
                let element = start..start + width;
                let distance =
                    ordinal(&actual[element.clone()]).abs_diff(ordinal(&expected[element.clone()]));
                near[element].fill(distance <= self.ulps as u64);
            }
        }
        match (0..actual.len()).find(|&i| actual[i] != expected[i] && !near[i]) {
            None => Ok(()),
            Some(byte) => {
                let element = byte / width * width..byte / width * width + width;
                Err(format!(
                    "{}: element {} of its memory is {:02x?}, expected {:02x?} within {} ulps",
                    self.field,
                    byte / width,
                    &actual[element.clone()],
                    &expected[element],
                    self.ulps
                ))
            }
        }
    }

    /// Where in the memory each element begins.
    fn element_offsets(&self, width: usize) -> Vec<usize> {
        let mut offsets = vec![self.byte_offset as usize];
        let mut compact = self.shape.iter().product::<i64>();
        for (dim, &size) in self.shape.iter().enumerate() {
            compact /= size.max(1);
            let stride = self
                .strides
                .as_ref()
                .map_or(compact, |strides| strides[dim]);
            offsets = offsets
                .iter()
                .flat_map(|&start| (0..size).map(move |i| start + (i * stride) as usize * width))
                .collect();
        }
        offsets
    }
}

/// A float's place among all floats of its width.
fn ordinal(little_endian: &[u8]) -> i64 {
    let unused = 64 - 8 * little_endian.len();
    let bits = little_endian
        .iter()
        .rev()
        .fold(0, |bits, &byte| bits << 8 | i64::from(byte));
    let value = bits << unused >> unused; // sign-extended
    let magnitude = value & (i64::MAX >> unused);
    if value < 0 {
        -magnitude
    } else {
        magnitude
    }
}

fn dtype(name: &str) -> Result<DType, String> {
    Ok(match name {
        "float32" => DType::FLOAT32,
        "float16" => DType::FLOAT16,
        "bfloat16" => DType::BFLOAT16,
        "float8_e4m3fn" => DType::FLOAT8_E4M3FN,
        "int32" => DType::INT32,
        "int64" => DType::INT64,
        "uint8" => DType::UINT8,
        _ => return Err(format!("unknown dtype {}", name)),
    })
}

fn word<'a>(words: &mut SplitWhitespace<'a>) -> Result<&'a str, String> {
    words.next().ok_or_else(|| "a word is missing".to_string())
}

fn number<T: FromStr>(word: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("not a number: {}", word))
}

fn list(word: &str) -> Result<Vec<i64>, String> {
    word.split(',').map(number).collect()
}

fn hex(word: &str) -> Result<Vec<u8>, String> {
    if word.len() % 2 != 0 {
        return Err("an odd number of digits".to_string());
    }
    (0..word.len() / 2)
        .map(|i| {
            let byte = word.get(2 * i..2 * i + 2).unwrap_or("");
            u8::from_str_radix(byte, 16).map_err(|_| format!("not hex: {}", byte))
        })
        .collect()
}
