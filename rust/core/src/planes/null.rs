//! The block backend that does nothing, for measuring what everything else costs.

use super::blk::{Backend, Buffers, Failure};

/// What QEMU calls null-co: a read leaves the guest's buffers as they are, a write goes nowhere.
pub struct NullBackend;

impl Backend for NullBackend {
    fn read(&self, into: &Buffers<'_>, _offset: u64) -> Result<usize, Failure> {
        Ok(into.total())
    }

    fn write(&self, from: &Buffers<'_>, _offset: u64) -> Result<usize, Failure> {
        Ok(from.total())
    }

    fn flush(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn discard(&self, _length: u64, _offset: u64) -> Result<(), Failure> {
        Ok(())
    }

    fn write_zeroes(&self, _length: u64, _offset: u64, _unmap: bool) -> Result<(), Failure> {
        Ok(())
    }
}
