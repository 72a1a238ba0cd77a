//! Tensors that borrow slices.

use crate::sys::{self, DLDataType, DLDevice, DLTensor};
use crate::{Error, Result, SamplingParams};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Deref;

pub type DType = DLDataType;

impl DType {
    pub const FLOAT32: DType = dtype(sys::TENON_DL_FLOAT, 32);
    pub const FLOAT16: DType = dtype(sys::TENON_DL_FLOAT, 16);
    pub const BFLOAT16: DType = dtype(sys::TENON_DL_BFLOAT, 16);
    pub const FLOAT8_E4M3FN: DType = dtype(sys::TENON_DL_FLOAT8_E4M3FN, 8);
    pub const INT32: DType = dtype(sys::TENON_DL_INT, 32);
    pub const INT64: DType = dtype(sys::TENON_DL_INT, 64);
    pub const UINT8: DType = dtype(sys::TENON_DL_UINT, 8);
}

const fn dtype(code: u8, bits: u8) -> DType {
    DType {
        code,
        bits,
        lanes: 1,
    }
}

/// The bits of a float16, a bfloat16 and a float8_e4m3fn.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct F16(pub u16);
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bf16(pub u16);
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct F8E4M3(pub u8);

/// A type that tensors can be made of.
///
/// # Safety
/// Values are `DTYPE.bits` wide, and all bits are valid.
pub unsafe trait Element: Copy {
    const DTYPE: DType;
}

unsafe impl Element for f32 {
    const DTYPE: DType = DType::FLOAT32;
}
unsafe impl Element for F16 {
    const DTYPE: DType = DType::FLOAT16;
}
unsafe impl Element for Bf16 {
    const DTYPE: DType = DType::BFLOAT16;
}
unsafe impl Element for F8E4M3 {
    const DTYPE: DType = DType::FLOAT8_E4M3FN;
}
unsafe impl Element for i32 {
    const DTYPE: DType = DType::INT32;
}
unsafe impl Element for i64 {
    const DTYPE: DType = DType::INT64;
}
unsafe impl Element for u8 {
    const DTYPE: DType = DType::UINT8;
}

/// A tensor that ops read.
#[repr(transparent)]
pub struct Tensor<'a> {
    raw: DLTensor,
    borrow: PhantomData<&'a [u8]>,
}

impl<'a> Tensor<'a> {
    /// A compact, row-major tensor of this shape on a slice of as many elements.
    pub fn new<T: Element>(data: &'a [T], shape: &'a [i64]) -> Result<Tensor<'a>> {
        check_extent(data.len(), shape, None)?;
        Ok(Tensor::on(data.as_ptr(), shape, None))
    }

    /// A view with strides, in elements, that starts where the slice does.
    pub fn strided<T: Element>(
        data: &'a [T],
        shape: &'a [i64],
        strides: &'a [i64],
    ) -> Result<Tensor<'a>> {
        check_extent(data.len(), shape, Some(strides))?;
        Ok(Tensor::on(data.as_ptr(), shape, Some(strides)))
    }

    /// Any tensor, also in CUDA memory.
    ///
    /// # Safety
    /// What `raw` points to is valid for `'a`, and nothing writes to it.
    pub unsafe fn from_raw(raw: DLTensor) -> Tensor<'a> {
        Tensor {
            raw,
            borrow: PhantomData,
        }
    }

    fn on<T: Element>(data: *const T, shape: &[i64], strides: Option<&[i64]>) -> Tensor<'a> {
        Tensor {
            raw: DLTensor {
                data: data as *mut c_void,
                device: DLDevice {
                    device_type: sys::TENON_DL_CPU,
                    device_id: 0,
                },
                ndim: shape.len() as i32,
                dtype: T::DTYPE,
                // C's DLTensor is not const-correct; ops do not write here.
                shape: shape.as_ptr() as *mut i64,
                strides: strides.map_or(std::ptr::null_mut(), |s| s.as_ptr() as *mut i64),
                byte_offset: 0,
            },
            borrow: PhantomData,
        }
    }

    pub(crate) fn pointer(tensor: Option<&Tensor>) -> *const DLTensor {
        tensor.map_or(std::ptr::null(), |t| &t.raw)
    }
}

/// A tensor that ops may write to. It can be given as an input as well, for ops
/// that work in place; the slice is free again when this is gone.
#[repr(transparent)]
pub struct TensorMut<'a> {
    tensor: Tensor<'a>,
    borrow: PhantomData<&'a mut [u8]>,
}

impl<'a> TensorMut<'a> {
    pub fn new<T: Element>(data: &'a mut [T], shape: &'a [i64]) -> Result<TensorMut<'a>> {
        check_extent(data.len(), shape, None)?;
        Ok(TensorMut::from(Tensor::on(data.as_mut_ptr(), shape, None)))
    }

    pub fn strided<T: Element>(
        data: &'a mut [T],
        shape: &'a [i64],
        strides: &'a [i64],
    ) -> Result<TensorMut<'a>> {
        check_extent(data.len(), shape, Some(strides))?;
        let tensor = Tensor::on(data.as_mut_ptr(), shape, Some(strides));
        Ok(TensorMut::from(tensor))
    }

    /// # Safety
    /// What `raw` points to is valid for `'a`, and nothing else uses it.
    pub unsafe fn from_raw(raw: DLTensor) -> TensorMut<'a> {
        TensorMut::from(Tensor::from_raw(raw))
    }

    fn from(tensor: Tensor<'a>) -> TensorMut<'a> {
        TensorMut {
            tensor,
            borrow: PhantomData,
        }
    }

    pub(crate) fn pointer(tensor: Option<&TensorMut>) -> *const DLTensor {
        Tensor::pointer(tensor.map(|t| &t.tensor))
    }
}

impl<'a> Deref for TensorMut<'a> {
    type Target = Tensor<'a>;

    fn deref(&self) -> &Tensor<'a> {
        &self.tensor
    }
}

/// Fails unless every element of the tensor is inside a slice of `length`.
fn check_extent(length: usize, shape: &[i64], strides: Option<&[i64]>) -> Result<()> {
    let invalid = |what: &str| {
        Error::invalid_argument(format!(
            "a tensor of shape {:?} and strides {:?} on {} elements: {}",
            shape, strides, length, what
        ))
    };
    if strides.map_or(false, |s| s.len() != shape.len()) {
        return Err(invalid("one stride for each dimension is needed"));
    }
    if shape.iter().chain(strides.unwrap_or(&[])).any(|&n| n < 0) {
        return Err(invalid("a negative number"));
    }
    if shape.contains(&0) {
        return Ok(());
    }
    let end = match strides {
        None => shape
            .iter()
            .try_fold(1, |n: i64, &size| n.checked_mul(size)),
        Some(strides) => shape
            .iter()
            .zip(strides)
            .try_fold(1, |n: i64, (&size, &stride)| {
                n.checked_add(stride.checked_mul(size - 1)?)
            }),
    };
    match end {
        Some(end) if end as u64 <= length as u64 => Ok(()),
        _ => Err(invalid("too large")),
    }
}

/// Sampling parameters as `ops::Sampler` takes them: a tensor of uint8, of shape
/// [rows, 128].
pub fn sampling_bytes(params: &[SamplingParams]) -> &[u8] {
    // SAFETY: the struct is plain numbers without holes.
    unsafe { std::slice::from_raw_parts(params.as_ptr().cast(), std::mem::size_of_val(params)) }
}

#[repr(C, align(256))]
#[derive(Clone, Copy)]
struct Block([u8; 256]);

/// Scratch memory of ops, aligned as they want it.
pub struct Workspace {
    data: *mut c_void,
    size: u64,
    _memory: Vec<Block>,
}

// SAFETY: the memory is the workspace's own.
unsafe impl Send for Workspace {}

impl Workspace {
    pub fn new(size: u64) -> Workspace {
        let num_blocks = (size as usize + 255) / 256;
        let mut memory = vec![Block([0; 256]); num_blocks];
        Workspace {
            data: memory.as_mut_ptr().cast(),
            size,
            _memory: memory,
        }
    }

    /// # Safety
    /// The memory, of the context's device, outlives this and is used by nothing
    /// else.
    pub unsafe fn from_raw(data: *mut c_void, size: u64) -> Workspace {
        Workspace {
            data,
            size,
            _memory: Vec::new(),
        }
    }

    pub(crate) fn data(&mut self) -> *mut c_void {
        self.data
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}
