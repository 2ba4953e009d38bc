//! Which requests of a queue are in flight, noted in memory that outlives this process (vhost-user, "Inflight I/O
//! tracking").
//!
//! The front-end keeps the memory and hands it to the back-end that comes after a crash, which does again what was
//! not done. Stores are ordered so that a kill between any two leaves nothing lost. What is read there may have been
//! written by anybody: it is read once, checked, and at worst breaks the device.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use crate::memory::GuestMemory;
use crate::GuestError;

/// The version of both layouts; a region of zeroes has not been used yet.
pub(super) const VERSION: u16 = 1;
/// Bytes to which the region of each queue is aligned, as other back-ends do.
const ALIGN: u64 = 64;
/// Bytes of the larger layout, the packed ring's.
const LARGEST: (u64, u64) = (32, 32);
const HEADER_WORDS: usize = 2;
const IN_FLIGHT: u64 = 0xff;

/// 16-bit words of the header.
const VERSION_AT: usize = 4;
const ENTRIES_AT: usize = 5;
const LAST_BATCH_HEAD_AT: usize = 6;
const USED_IDX_AT: usize = 7;

/// The part of the shared memory that is one queue's.
#[derive(Clone)]
pub struct InflightRegion {
    /// The file that the front-end keeps, from address 0.
    pub memory: GuestMemory,
    pub at: u64,
    /// Descriptors it has room for: the largest ring.
    pub entries: u16,
}

impl InflightRegion {
    /// Bytes of the region of one queue, in either layout.
    pub fn bytes(entries: u16) -> u64 {
        let (header, entry) = LARGEST;
        (header + u64::from(entries) * entry).next_multiple_of(ALIGN)
    }

    /// Forget what it says: the ring begins anew.
    pub fn clear(&self) -> Result<(), GuestError> {
        let words = self.words(0)?;
        for at in 0..Self::bytes(self.entries) as usize / 8 {
            // SAFETY: `words` checked that so many bytes are mapped there, and aligned.
            unsafe { &*words.add(at) }.store(0, Ordering::Release);
        }
        Ok(())
    }

    /// Where it is mapped, if it is large enough for a ring of `size` entries.
    pub(super) fn words(&self, size: u16) -> Result<*const AtomicU64, GuestError> {
        let words: *const AtomicU64 = self.memory.host(self.at, Self::bytes(self.entries))?.cast();
        if !words.is_aligned() {
            return Err(garbage(&format!("it starts at {:#x}, which is no multiple of 8", self.at)));
        }
        if size > self.entries {
            return Err(garbage(&format!("it has {} entries and the ring {size}", self.entries)));
        }
        Ok(words)
    }
}

/// The notes about a split ring. Only touched with the queue's lock held.
pub(super) struct Inflight {
    /// Keeps `words` mapped.
    _memory: GuestMemory,
    words: *const AtomicU64,
    size: u16,
    /// Numbers requests in the order in which they were taken.
    counter: u64,
    /// Heads that have been written to the used ring since the driver last was told.
    batch: Vec<u16>,
    /// Heads that an earlier process took and never gave back, in that order.
    again: VecDeque<u16>,
}

// SAFETY: the pointer leads to shared memory that is only accessed atomically, and that `_memory` keeps mapped.
unsafe impl Send for Inflight {}
// SAFETY: as above.
unsafe impl Sync for Inflight {}

impl Inflight {
    /// Take over what the region says of a ring of `size` entries, whose used index is `used_idx`.
    pub fn open(region: &InflightRegion, size: u16, used_idx: u16) -> Result<Self, GuestError> {
        let words = region.words(size)?;
        let (batch, again) = (Vec::with_capacity(size.into()), VecDeque::new());
        let mut inflight = Self { _memory: region.memory.clone(), words, size, counter: 0, batch, again };
        inflight.check_header(region.entries, used_idx)?;
        inflight.finish_last_batch(used_idx)?;
        inflight.find_unfinished();
        Ok(inflight)
    }

    fn check_header(&self, entries: u16, used_idx: u16) -> Result<(), GuestError> {
        match (self.load(VERSION_AT), self.load(ENTRIES_AT)) {
            (0, _) => {
                self.store(ENTRIES_AT, entries);
                self.store(USED_IDX_AT, used_idx);
                self.store(VERSION_AT, VERSION);
                Ok(())
            }
            (VERSION, there) if there == entries => Ok(()),
            (VERSION, there) => Err(garbage(&format!("it says that it has {there} entries, not {entries}"))),
            (version, _) => Err(garbage(&format!("version {version}; only {VERSION} is known"))),
        }
    }

    /// The driver was told of a batch, and then nobody was left to note it.
    fn finish_last_batch(&self, used_idx: u16) -> Result<(), GuestError> {
        let told = used_idx.wrapping_sub(self.load(USED_IDX_AT));
        if told > self.size {
            return Err(garbage(&format!(
                "the used index is {told} entries ahead of it (the queue has {})",
                self.size
            )));
        }
        let mut head = self.load(LAST_BATCH_HEAD_AT);
        for _ in 0..told {
            if head >= self.size {
                return Err(garbage(&format!("head {head} of its last batch is past the descriptor table")));
            }
            let next = (self.state(head).load(Ordering::Relaxed) >> 48) as u16;
            self.set_state(head, next, false);
            head = next;
        }
        self.store(USED_IDX_AT, used_idx);
        Ok(())
    }

    fn find_unfinished(&mut self) {
        let unfinished = (0..self.size).filter(|&head| self.state(head).load(Ordering::Relaxed) & IN_FLIGHT != 0);
        let mut found: Vec<(u64, u16)> =
            unfinished.map(|head| (self.counter_of(head).load(Ordering::Relaxed), head)).collect();
        found.sort_unstable();
        self.counter = found.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        self.again = found.into_iter().map(|(_, head)| head).collect();
    }

    /// How many requests of an earlier process are still to be done again.
    pub fn unfinished(&self) -> u16 {
        self.again.len() as u16
    }

    /// The next request that is to be done again.
    pub fn again(&mut self) -> Option<u16> {
        self.again.pop_front()
    }

    /// The request was taken.
    pub fn take(&mut self, head: u16) {
        self.counter_of(head).store(self.counter, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
        self.set_state(head, 0, true);
    }

    /// The request was not needed after all: it is the next to be done again.
    pub fn untake(&mut self, head: u16) {
        self.again.push_front(head);
    }

    /// The request was written to the used ring, of which the driver will be told.
    pub fn put(&mut self, head: u16) {
        self.set_state(head, self.load(LAST_BATCH_HEAD_AT), true);
        self.store(LAST_BATCH_HEAD_AT, head);
        self.batch.push(head);
    }

    /// The driver has been told of everything up to `used_idx`.
    pub fn published(&mut self, used_idx: u16) {
        while let Some(head) = self.batch.pop() {
            self.state(head).fetch_and(!IN_FLIGHT, Ordering::Release);
        }
        self.store(USED_IDX_AT, used_idx);
    }

    fn set_state(&self, head: u16, next: u16, in_flight: bool) {
        self.state(head).store(u64::from(in_flight) | u64::from(next) << 48, Ordering::Release);
    }

    fn load(&self, at: usize) -> u16 {
        self.half(at).load(Ordering::Relaxed)
    }

    fn store(&self, at: usize, value: u16) {
        self.half(at).store(value, Ordering::Release);
    }

    /// A 16-bit word of the header.
    fn half(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at < 4 * HEADER_WORDS);
        // SAFETY: `open` checked the header, and `_memory` keeps it mapped.
        unsafe { &*self.words.cast::<AtomicU16>().add(at) }
    }

    /// Whether the head is in flight, in the lowest 8 bits, and in the highest 16 the next head of its batch.
    fn state(&self, head: u16) -> &AtomicU64 {
        debug_assert!(head < self.size);
        // SAFETY: `open` checked two words for each of `size` heads; callers have checked the head.
        unsafe { &*self.words.add(HEADER_WORDS + 2 * usize::from(head)) }
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        debug_assert!(head < self.size);
        // SAFETY: as in `state`.
        unsafe { &*self.words.add(HEADER_WORDS + 2 * usize::from(head) + 1) }
    }
}

pub(super) fn garbage(what: &str) -> GuestError {
    GuestError(format!("the region of requests in flight: {what}"))
}
