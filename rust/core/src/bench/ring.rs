//! The driver's half of a ring; here that of a split one (virtio 1.3, 2.7).

use std::sync::atomic::{fence, AtomicU16, AtomicU32, AtomicU64, Ordering};

use smallvec::SmallVec;

use super::packed::PackedRing;
use crate::memory::GuestMemory;
use crate::queue::RingConfig;
use crate::GuestError;

pub const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
pub const DESC_BYTES: u64 = 16;
/// `used.flags`, `avail.flags`: the other side need not be told.
const NO_NOTIFY: u16 = 1;

/// A buffer of a request; `flags` say whether the device writes it.
#[derive(Debug, Clone, Copy)]
pub struct Desc {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
}

impl Desc {
    pub fn readable(address: u64, length: u32) -> Self {
        Self { address, length, flags: 0 }
    }

    pub fn writable(address: u64, length: u32) -> Self {
        Self { address, length, flags: WRITE }
    }

    pub fn table(address: u64, entries: usize) -> Self {
        Self { address, length: (entries as u64 * DESC_BYTES) as u32, flags: INDIRECT }
    }

    /// The descriptor as it lies in a packed ring or in a table of one, with these flags besides its own.
    pub fn packed_words(self, id: u16, flags: u16) -> [u64; 2] {
        let rest = u64::from(self.length) | u64::from(id) << 32 | u64::from(self.flags | flags) << 48;
        [self.address.to_le(), rest.to_le()]
    }

    /// The descriptor as it lies in a split ring, `next` being where the chain goes on.
    fn words(self, next: Option<u16>) -> [u64; 2] {
        let flags = self.flags | if next.is_some() { NEXT } else { 0 };
        let rest = u64::from(self.length) | u64::from(flags) << 32 | u64::from(next.unwrap_or(0)) << 48;
        [self.address.to_le(), rest.to_le()]
    }
}

/// A ring of either kind. Methods are described at the split one's.
pub enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

impl Ring {
    pub fn new(memory: GuestMemory, config: &RingConfig, per_slot: u16) -> Result<Self, GuestError> {
        if config.packed {
            PackedRing::new(memory, config, per_slot).map(Self::Packed)
        } else {
            SplitRing::new(memory, config, per_slot).map(Self::Split)
        }
    }

    pub fn offer(&mut self, slot: u16, chain: &[Desc]) {
        match self {
            Self::Split(ring) => ring.offer(slot, chain),
            Self::Packed(ring) => ring.offer(slot, chain),
        }
    }

    /// An indirect table as it lies in memory; that of a packed ring has no links.
    pub fn table(&self, chain: &[Desc]) -> SmallVec<[u8; 64]> {
        let words = |(n, desc): (usize, &Desc)| match self {
            Self::Split(_) => desc.words((n + 1 < chain.len()).then_some(n as u16 + 1)),
            Self::Packed(_) => desc.packed_words(0, 0),
        };
        chain.iter().enumerate().flat_map(words).flat_map(u64::to_ne_bytes).collect()
    }

    pub fn publish(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.publish(),
            Self::Packed(ring) => ring.publish(),
        }
    }

    pub fn used(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.used(),
            Self::Packed(ring) => ring.used(),
        }
    }

    pub fn pop(&mut self) -> Option<(u16, u32)> {
        match self {
            Self::Split(ring) => ring.pop(),
            Self::Packed(ring) => ring.pop(),
        }
    }

    pub fn set_interrupts(&self, after: Option<u16>) {
        match self {
            Self::Split(ring) => ring.set_interrupts(after),
            Self::Packed(ring) => ring.set_interrupts(after),
        }
    }
}

/// Describe a chain from entry `first` of a table on.
///
/// # Safety
/// `table` leads to that many descriptors of mapped memory, which is accessed atomically only.
unsafe fn write_chain(table: *const AtomicU64, first: u16, chain: &[Desc]) {
    for (n, desc) in chain.iter().enumerate() {
        let index = first + n as u16;
        let next = (n + 1 < chain.len()).then_some(index + 1);
        for (word, value) in desc.words(next).into_iter().enumerate() {
            // SAFETY: by the contract.
            unsafe { &*table.add(2 * usize::from(index) + word) }.store(value, Ordering::Relaxed);
        }
    }
}

/// Requests have fixed places: the one of slot `n` has the descriptors from `n * per_slot` on.
pub struct SplitRing {
    /// Keeps the areas mapped.
    _memory: GuestMemory,
    desc: *const AtomicU64,
    avail: *const AtomicU16,
    used: *const AtomicU32,
    size: u16,
    per_slot: u16,
    event_idx: bool,
    next_avail: u16,
    published: u16,
    next_used: u16,
}

// SAFETY: the pointers lead to shared memory, kept mapped by `_memory` and only accessed atomically.
unsafe impl Send for SplitRing {}

impl SplitRing {
    pub fn new(memory: GuestMemory, config: &RingConfig, per_slot: u16) -> Result<Self, GuestError> {
        let size = u64::from(config.size);
        Ok(Self {
            desc: memory.host(config.desc, size * DESC_BYTES)?.cast(),
            avail: memory.host(config.avail, 6 + 2 * size)?.cast(),
            used: memory.host(config.used, 6 + 8 * size)?.cast(),
            _memory: memory,
            size: config.size,
            per_slot,
            event_idx: config.event_idx,
            next_avail: config.next_avail,
            published: config.next_avail,
            next_used: config.next_used,
        })
    }

    /// The avail ring in 16-bit words: flags, idx, ring[size], used_event.
    fn avail(&self, word: u16) -> &AtomicU16 {
        // SAFETY: `new` checked size + 3 words, and entries are masked by the size.
        unsafe { &*self.avail.add(word.into()) }
    }

    /// The used ring in 16-bit words: flags, idx, then four for each entry, avail_event.
    fn used16(&self, word: usize) -> &AtomicU16 {
        // SAFETY: `new` checked 3 + 4 * size words.
        unsafe { &*self.used.cast::<AtomicU16>().add(word) }
    }

    /// Put a request into the ring; the device sees it with the next `publish`.
    pub fn offer(&mut self, slot: u16, chain: &[Desc]) {
        let head = slot * self.per_slot;
        debug_assert!(head + self.per_slot <= self.size && chain.len() == usize::from(self.per_slot));
        // SAFETY: `new` checked `size` descriptors.
        unsafe { write_chain(self.desc, head, chain) };
        self.avail(2 + (self.next_avail & (self.size - 1))).store(head.to_le(), Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Show the device what was offered; true if it asked to be kicked for that.
    pub fn publish(&mut self) -> bool {
        let old = std::mem::replace(&mut self.published, self.next_avail);
        let new = self.published;
        if new == old {
            return false;
        }
        self.avail(1).store(new.to_le(), Ordering::Release);
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return u16::from_le(self.used16(0).load(Ordering::Relaxed)) & NO_NOTIFY == 0;
        }
        let event = u16::from_le(self.used16(2 + 4 * usize::from(self.size)).load(Ordering::Relaxed));
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// How many requests the device has given back that were not popped.
    pub fn used(&self) -> u16 {
        u16::from_le(self.used16(1).load(Ordering::Acquire)).wrapping_sub(self.next_used)
    }

    /// The slot of the next request that `used` counted, and how many bytes the device says that it has written; None if
    /// it names a descriptor that begins none.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        let entry = 1 + 2 * usize::from(self.next_used & (self.size - 1));
        // SAFETY: `new` checked one word and `size` entries of two.
        let [head, length] =
            [0, 1].map(|word| u32::from_le(unsafe { &*self.used.add(entry + word) }.load(Ordering::Relaxed)));
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(head).ok()?;
        (head % self.per_slot == 0).then_some((head / self.per_slot, length))
    }

    /// Ask to be interrupted when so many requests have been used, 1 at least, or not to be; look at `used` once more
    /// after this. Without EVENT_IDX there is an interrupt after each.
    pub fn set_interrupts(&self, after: Option<u16>) {
        if self.event_idx {
            let event = self.next_used.wrapping_add(after.unwrap_or(0)).wrapping_sub(1);
            self.avail(2 + self.size).store(event.to_le(), Ordering::Relaxed);
        } else {
            self.avail(0).store(u16::from(after.is_none()).to_le(), Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }
}
