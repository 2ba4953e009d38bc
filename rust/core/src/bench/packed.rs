//! The driver's half of a packed ring (virtio 1.3, 2.8).

use std::sync::atomic::{fence, AtomicU16, AtomicU64, Ordering};

use super::ring::{Desc, DESC_BYTES, NEXT};
use crate::memory::GuestMemory;
use crate::queue::RingConfig;
use crate::GuestError;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Flags of the event suppression structures.
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const AT_DESC: u16 = 2;

/// An index with its wrap counter.
#[derive(Clone, Copy)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    fn plus(self, n: u16, size: u16) -> Self {
        match self.index + n {
            index if index < size => Self { index, ..self },
            index => Self { index: index - size, wrap: !self.wrap },
        }
    }

    fn encoded(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }
}

/// All requests have the same number of descriptors; the buffer id of one is its slot.
pub struct PackedRing {
    /// Keeps the areas mapped.
    _memory: GuestMemory,
    desc: *const AtomicU64,
    /// The event suppression structures of the driver and of the device: event, flags.
    driver: *const AtomicU16,
    device: *const AtomicU16,
    size: u16,
    per_slot: u16,
    event_idx: bool,
    next_avail: Place,
    /// Descriptors offered since the last `publish`.
    added: u16,
    next_used: Place,
}

// SAFETY: the pointers lead to shared memory, kept mapped by `_memory` and only accessed atomically.
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// A fresh ring.
    pub fn new(memory: GuestMemory, config: &RingConfig, per_slot: u16) -> Result<Self, GuestError> {
        let fresh = Place { index: 0, wrap: true };
        Ok(Self {
            desc: memory.host(config.desc, u64::from(config.size) * DESC_BYTES)?.cast(),
            driver: memory.host(config.avail, 4)?.cast(),
            device: memory.host(config.used, 4)?.cast(),
            _memory: memory,
            size: config.size,
            per_slot,
            event_idx: config.event_idx,
            next_avail: fresh,
            added: 0,
            next_used: fresh,
        })
    }

    /// A word of a descriptor: 0 is the address; 1 is length, id and flags.
    fn word(&self, place: Place, word: usize) -> &AtomicU64 {
        // SAFETY: `new` checked `size` descriptors, and a place is below that.
        unsafe { &*self.desc.add(2 * usize::from(place.index) + word) }
    }

    /// Put a request into the ring; the device may see it from here on.
    pub fn offer(&mut self, slot: u16, chain: &[Desc]) {
        let first = self.next_avail;
        // Backwards: with the flags of the first the device may take all of them.
        for (n, desc) in chain.iter().enumerate().rev() {
            let place = first.plus(n as u16, self.size);
            let next = if n + 1 < chain.len() { NEXT } else { 0 };
            let [address, rest] = desc.packed_words(slot, next | if place.wrap { AVAIL } else { USED });
            self.word(place, 0).store(address, Ordering::Relaxed);
            self.word(place, 1).store(rest, Ordering::Release);
        }
        self.next_avail = first.plus(chain.len() as u16, self.size);
        self.added += chain.len() as u16;
    }

    /// True if the device asked to be kicked for what was offered since the last call.
    pub fn publish(&mut self) -> bool {
        let added = std::mem::take(&mut self.added);
        fence(Ordering::SeqCst);
        // SAFETY: `new` checked two words.
        let [event, flags] =
            [0, 1].map(|word| u16::from_le(unsafe { &*self.device.add(word) }.load(Ordering::Relaxed)));
        match flags {
            _ if added == 0 => false,
            DISABLE => false,
            AT_DESC if self.event_idx => self.was_passed(event, added),
            _ => true,
        }
    }

    /// Whether the place that the device waits for is among the last `added` ones.
    fn was_passed(&self, event: u16, added: u16) -> bool {
        let new = self.next_avail.index;
        let lap = if (event >> 15 != 0) == self.next_avail.wrap { 0 } else { self.size };
        let event = (event & 0x7fff).wrapping_sub(lap);
        new.wrapping_sub(event).wrapping_sub(1) < added
    }

    /// The id of the request that was given back at `place`, and the bytes written, if one was.
    fn given_back_at(&self, place: Place) -> Option<(u16, u32)> {
        let rest = u64::from_le(self.word(place, 1).load(Ordering::Acquire));
        let flags = (rest >> 48) as u16;
        let both = [AVAIL, USED].map(|flag| flags & flag != 0);
        (both == [place.wrap; 2]).then_some(((rest >> 32) as u16, rest as u32))
    }

    /// How many requests the device has given back that were not popped.
    pub fn used(&self) -> u16 {
        let (mut place, mut count) = (self.next_used, 0);
        while count < self.size / self.per_slot && self.given_back_at(place).is_some() {
            (place, count) = (place.plus(self.per_slot, self.size), count + 1);
        }
        count
    }

    /// The slot of the next request that `used` counted, and the bytes written.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        let given_back = self.given_back_at(self.next_used)?;
        self.next_used = self.next_used.plus(self.per_slot, self.size);
        Some(given_back)
    }

    /// Ask to be interrupted when so many requests have been used, or not to be; look at `used` once more after this.
    pub fn set_interrupts(&self, after: Option<u16>) {
        let flags = match (after, self.event_idx) {
            (None, _) => DISABLE,
            (Some(_), false) => ENABLE,
            (Some(_), true) => AT_DESC,
        };
        let event = self.next_used.plus(after.map_or(0, |after| after - 1) * self.per_slot, self.size);
        // SAFETY: `new` checked two words.
        let words = unsafe { [&*self.driver, &*self.driver.add(1)] };
        words[0].store(event.encoded().to_le(), Ordering::Relaxed);
        words[1].store(flags.to_le(), Ordering::Release);
        fence(Ordering::SeqCst);
    }
}
