//! Buffers that O_DIRECT takes.

use std::alloc::{alloc_zeroed, dealloc, handle_alloc_error, Layout};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::chain::Segment;

/// Whether address and length of all segments are multiples of `align`, a power of two.
pub fn is_aligned(segments: &[Segment], align: usize) -> bool {
    segments.iter().fold(0, |bits, segment| bits | segment.iov_base as usize | segment.iov_len) & (align - 1) == 0
}

/// Bytes at an address that is a multiple of what was asked for.
pub struct AlignedBuffer {
    start: NonNull<u8>,
    layout: Layout,
}

impl AlignedBuffer {
    /// `length` is more than 0, `align` a power of two.
    pub fn new(length: usize, align: usize) -> Self {
        let layout = Layout::from_size_align(length.max(1), align).expect("less than half of the address space");
        // SAFETY: the size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        Self { start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)), layout }
    }

    /// For the kernel to read or write, while the buffer lives.
    pub fn segment(&mut self) -> Segment {
        Segment { iov_base: self.start.as_ptr().cast(), iov_len: self.layout.size() }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes were allocated, and initialized.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}
