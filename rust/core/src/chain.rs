//! One request of the driver: host memory to read, then host memory to write.

use std::io;
use std::sync::Arc;

use smallvec::SmallVec;
use vm_memory::VolatileSlice;

use crate::memory::GuestMemory;
use crate::queue::{Receipt, Used, VirtQueue};
use crate::GuestError;

/// A piece of guest memory in this process. The guest may change it at any time: copy out first, then check.
pub type Segment = libc::iovec;

/// The checked segments of a chain, readable ones first.
#[derive(Default)]
pub struct Segments {
    pieces: SmallVec<[Segment; 4]>,
    /// How many of them are device-readable.
    readable: usize,
    /// Bytes of all of them, and of the writable ones.
    total: u32,
    room: u32,
}

// SAFETY: the pointers lead to shared guest memory, which any thread may access.
unsafe impl Send for Segments {}
// SAFETY: as above.
unsafe impl Sync for Segments {}

impl Segments {
    /// Add the buffer of one descriptor.
    pub(crate) fn push(
        &mut self,
        memory: &GuestMemory,
        address: u64,
        length: u32,
        writable: bool,
    ) -> Result<(), GuestError> {
        if !writable && self.readable < self.pieces.len() {
            return Err(GuestError("a device-readable buffer after a device-writable one".into()));
        }
        self.total = self
            .total
            .checked_add(length)
            .ok_or_else(|| GuestError(format!("{length} bytes more make the chain longer than 2^32 - 1")))?;
        memory.pieces(address, u64::from(length), |host, n| {
            self.pieces.push(Segment { iov_base: host.cast(), iov_len: n });
        })?;
        if writable {
            self.room += length;
        } else {
            self.readable = self.pieces.len();
        }
        Ok(())
    }

    pub fn readable(&self) -> &[Segment] {
        &self.pieces[..self.readable]
    }

    pub fn writable(&self) -> &[Segment] {
        &self.pieces[self.readable..]
    }
}

/// How far a chain has been read or written.
#[derive(Default)]
struct Cursor {
    segment: usize,
    offset: usize,
    left: u32,
}

impl Cursor {
    fn over(segments: &[Segment]) -> Self {
        // `Segments::push` keeps the sum within 32 bits.
        Self { left: segments.iter().map(|segment| segment.iov_len as u32).sum(), ..Self::default() }
    }

    /// Advance by at most `limit` bytes, calling `each` with the memory passed over.
    fn advance(&mut self, segments: &[Segment], limit: usize, mut each: impl FnMut(*mut u8, usize)) -> usize {
        let wanted = limit.min(self.left as usize);
        let mut done = 0;
        while done < wanted {
            let segment = &segments[self.segment];
            let n = (segment.iov_len - self.offset).min(wanted - done);
            // SAFETY: `offset` is within the segment.
            each(unsafe { segment.iov_base.cast::<u8>().add(self.offset) }, n);
            done += n;
            self.offset += n;
            if self.offset == segment.iov_len {
                self.segment += 1;
                self.offset = 0;
            }
        }
        self.left -= done as u32;
        done
    }
}

/// Why a chain refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainError {
    /// Its device was reset, or its queue stopped: the work it was for no longer exists.
    Stale,
    /// It was completed before.
    Completed,
}

impl std::fmt::Display for ChainError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stale => "it was taken before the last reset of its device; nobody waits for it, let it go",
            Self::Completed => "it is completed already; complete() gives a chain back once",
        })
    }
}

impl std::error::Error for ChainError {}

/// One request: a value, with all its descriptors read once and checked when it was popped.
///
/// Reading and writing advance, and never stop short of the end of the chain. Dropping a live chain that was not
/// completed breaks the device.
pub struct Chain {
    vq: Arc<VirtQueue>,
    /// Keeps the segments mapped.
    memory: GuestMemory,
    segments: Segments,
    receipt: Receipt,
    epoch: u64,
    run: u64,
    reader: Cursor,
    writer: Cursor,
    written: u32,
    completed: bool,
}

impl Chain {
    pub(crate) fn new(
        vq: Arc<VirtQueue>,
        memory: GuestMemory,
        receipt: Receipt,
        segments: Segments,
        epoch: u64,
        run: u64,
    ) -> Self {
        Self {
            reader: Cursor::over(segments.readable()),
            writer: Cursor::over(segments.writable()),
            vq,
            memory,
            segments,
            receipt,
            epoch,
            run,
            written: 0,
            completed: false,
        }
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// What the driver knows it by: the head in a split ring, the buffer id in a packed one.
    pub fn head(&self) -> u16 {
        self.receipt.id
    }

    pub fn vq(&self) -> &Arc<VirtQueue> {
        &self.vq
    }

    /// Bytes left to read.
    pub fn readable_left(&self) -> usize {
        self.reader.left as usize
    }

    /// Bytes left to write.
    pub fn writable_left(&self) -> usize {
        self.writer.left as usize
    }

    /// Bytes written so far: the used length.
    pub fn written(&self) -> u32 {
        self.written
    }

    /// `Ok` while neither the device was reset nor the queue stopped.
    pub fn check_live(&self) -> Result<(), ChainError> {
        self.live(|| ())
    }

    /// Do something that a reset must wait for: a copy, never a call into Python.
    fn live<T>(&self, work: impl FnOnce() -> T) -> Result<T, ChainError> {
        // Who serves the queue has no need of a lock: every stop waits for it, and a reset stops the queues first.
        let state = self.vq.state();
        let _unchanged = (!self.vq.is_server()).then(|| state.shared());
        if state.epoch() != self.epoch || self.vq.run() != self.run {
            return Err(ChainError::Stale);
        }
        Ok(work())
    }

    /// Read the next bytes; fewer than asked for only where the chain ends.
    pub fn read(&mut self, out: &mut [u8]) -> Result<usize, ChainError> {
        let mut reader = std::mem::take(&mut self.reader);
        let result = self.live(|| {
            let mut done = 0;
            reader.advance(self.segments.readable(), out.len(), |host, n| {
                // SAFETY: the segment is mapped as long as `memory` lives.
                unsafe { VolatileSlice::new(host, n) }.copy_to(&mut out[done..done + n]);
                done += n;
            })
        });
        self.reader = reader;
        result
    }

    /// Write as much of `data` as fits; return how many bytes did.
    pub fn write(&mut self, data: &[u8]) -> Result<usize, ChainError> {
        let mut writer = std::mem::take(&mut self.writer);
        let result = self.live(|| {
            let mut done = 0;
            writer.advance(self.segments.writable(), data.len(), |host, n| {
                // SAFETY: the segment is mapped as long as `memory` lives.
                unsafe { VolatileSlice::new(host, n) }.copy_from(&data[done..done + n]);
                done += n;
            })
        });
        self.writer = writer;
        self.written += *result.as_ref().unwrap_or(&0) as u32;
        result
    }

    /// Give pages of guest memory that the driver named back to the host, see `GuestMemory::discard`.
    pub fn discard(&self, address: u64, length: u64) -> Result<io::Result<()>, ChainError> {
        self.live(|| self.memory.discard(address, length))
    }

    /// Give the pages of all device-writable buffers back.
    pub fn discard_writable(&self) -> Result<io::Result<()>, ChainError> {
        let discard = |segment: &Segment| match self.memory.address_of(segment.iov_base.cast()) {
            Some(address) => self.memory.discard(address, segment.iov_len as u64),
            None => Ok(()),
        };
        self.live(|| self.segments.writable().iter().try_for_each(discard))
    }

    /// Pass over the next `limit` readable bytes and return where they lie, to be read in place.
    ///
    /// Only while the queue is being served is a reset certain to wait for who uses them.
    pub fn take_readable(&mut self, limit: usize) -> SmallVec<[Segment; 4]> {
        let mut pieces = SmallVec::new();
        self.reader.advance(self.segments.readable(), limit, |host, n| {
            pieces.push(Segment { iov_base: host.cast(), iov_len: n });
        });
        pieces
    }

    /// Pass over the next `limit` writable bytes.
    pub fn skip_writable(&mut self, limit: usize) {
        self.writer.advance(self.segments.writable(), limit, |_, _| ());
    }

    /// Pass over the next `limit` writable bytes and return where they lie, to be written in place.
    ///
    /// They do not count as written until `wrote` says so. Lifetime as in `take_readable`.
    pub fn take_writable(&mut self, limit: usize) -> SmallVec<[Segment; 4]> {
        let mut pieces = SmallVec::new();
        self.writer.advance(self.segments.writable(), limit, |host, n| {
            pieces.push(Segment { iov_base: host.cast(), iov_len: n });
        });
        pieces
    }

    /// Bytes passed over to be written in place that do not count as written yet.
    pub fn uncounted(&self) -> usize {
        let room: usize = self.segments.writable().iter().map(|segment| segment.iov_len).sum();
        room - self.writable_left() - self.written as usize
    }

    /// Count bytes that were written in place.
    pub fn wrote(&mut self, bytes: u32) {
        self.written = self.written.saturating_add(bytes);
    }

    /// Give the chain back to the driver, with what was written as the used length.
    pub fn complete(&mut self) -> Result<(), ChainError> {
        if self.completed {
            self.check_live()?;
            return Err(ChainError::Completed);
        }
        let whole = self.written == self.segments.room;
        let used = Used { receipt: self.receipt, length: self.written, whole };
        let interrupt = self.live(|| self.vq.put(used, &self.memory, self.segments.writable()))?;
        self.completed = true;
        self.vq.decided(interrupt);
        self.vq.pass_late();
        Ok(())
    }
}

impl Chain {
    /// End without a completion; `back` gets the receipt unless the chain is stale.
    pub(crate) fn untake(mut self, back: impl FnOnce(Receipt)) {
        // It fails for a stale chain only, and then there is nothing to give back.
        let _ = self.live(|| back(self.receipt));
        self.completed = true;
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if !self.completed && self.check_live().is_ok() {
            self.vq.dropped(self.head());
        }
    }
}
