//! Which pages of guest memory a device has written, for a migration (vhost-user, "Migration").

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::Arc;

use crate::chain::Segment;
use crate::interrupt::CallFd;
use crate::memory::GuestMemory;

const PAGE: u64 = 4096;
/// A range of addresses: where it starts, and its bytes.
pub type Range = (u64, u64);

/// A bitmap with a bit for each page from guest address 0 on. The front-end clears bits at any time.
pub struct DirtyLog {
    /// The file of the bitmap, from address 0.
    bitmap: GuestMemory,
    /// Signalled after bits were set.
    changed: Option<Arc<CallFd>>,
}

impl DirtyLog {
    pub fn new(bitmap: GuestMemory, changed: Option<Arc<CallFd>>) -> Self {
        Self { bitmap, changed }
    }

    /// Mark what has been written. It has to be there already: a page is copied once its bit was cleared. Pages past the
    /// end of the bitmap are nobody's.
    fn mark(&self, (address, length): Range) {
        let Some(last) = length.checked_sub(1) else { return };
        for page in address / PAGE..=address.saturating_add(last) / PAGE {
            let Ok(byte) = self.bitmap.host(page / 8, 1) else { return };
            // SAFETY: `host` gives mapped memory, which is only accessed atomically.
            let byte = unsafe { AtomicU8::from_ptr(byte) };
            let bit = 1 << (page % 8);
            if byte.load(Ordering::Relaxed) & bit == 0 {
                byte.fetch_or(bit, Ordering::Release);
            }
        }
    }
}

/// What a queue marks in a log.
#[derive(Clone)]
pub struct QueueLog {
    pub log: Arc<DirtyLog>,
    /// The parts of the ring that the device writes.
    pub ring: Vec<Range>,
}

impl QueueLog {
    /// All that a request lets the device write: backends write in place, and some of it may be skipped.
    pub fn mark_written(&self, memory: &GuestMemory, writable: &[Segment]) {
        for segment in writable {
            if let Some(address) = memory.address_of(segment.iov_base.cast()) {
                self.log.mark((address, segment.iov_len as u64));
            }
        }
    }

    pub fn mark_ring(&self) {
        for &range in &self.ring {
            self.log.mark(range);
        }
    }

    pub fn tell(&self) {
        if let Some(changed) = &self.log.changed {
            changed.signal();
        }
    }
}
