//! A driver of one packed queue: it writes what it is told to, right or wrong.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering::SeqCst;

use pyvirtio_core::RingConfig;

use crate::driver::{Driver, AVAIL, BUFFERS, DESC, NEXT, USED, WRITE};

pub const AVAILABLE: u16 = 1 << 7;
pub const IS_USED: u16 = 1 << 15;
/// Where a fresh ring starts: index 0, wrap counter 1.
pub const FRESH: u16 = 1 << 15;
/// Flags of the event suppression structures.
pub const DISABLE: u16 = 1;
pub const AT_DESC: u16 = 2;

/// One descriptor as a driver describes it: address, length, flags.
pub type Part = (u64, u32, u16);

/// An index with its wrap counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub index: u16,
    pub wrap: bool,
}

impl Place {
    pub fn advance(&mut self, n: u16, size: u16) {
        self.index += n;
        if self.index >= size {
            (self.index, self.wrap) = (self.index - size, !self.wrap);
        }
    }

    pub fn encoded(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    pub fn decoded(raw: u16) -> Self {
        Self { index: raw & 0x7fff, wrap: raw >> 15 != 0 }
    }

    /// The flags that make a descriptor available there.
    pub fn available(self) -> u16 {
        if self.wrap {
            AVAILABLE
        } else {
            IS_USED
        }
    }
}

pub struct PackedDriver {
    driver: Driver,
    pub next: Place,
    pub seen: Place,
    /// Descriptors of each chain that is out, by buffer id.
    descs: HashMap<u16, u16>,
}

impl Deref for PackedDriver {
    type Target = Driver;

    fn deref(&self) -> &Driver {
        &self.driver
    }
}

impl DerefMut for PackedDriver {
    fn deref_mut(&mut self) -> &mut Driver {
        &mut self.driver
    }
}

impl PackedDriver {
    pub fn new() -> Self {
        Self::with(|_| ())
    }

    pub fn with(config: impl FnOnce(&mut RingConfig)) -> Self {
        let mut driver = Driver::new();
        (driver.config.packed, driver.config.next_avail, driver.config.next_used) = (true, FRESH, FRESH);
        config(&mut driver.config);
        let (next, seen) = (Place::decoded(driver.config.next_avail), Place::decoded(driver.config.next_used));
        Self { driver, next, seen, descs: HashMap::new() }
    }

    /// The same driver and its memory, with a device that knows nothing of what was before.
    pub fn with_a_new_device(&self) -> Self {
        let mut driver = self.driver.with_a_new_device();
        (driver.config.next_avail, driver.config.next_used) = (FRESH, FRESH);
        Self { driver, next: self.next, seen: self.seen, descs: self.descs.clone() }
    }

    /// Descriptors that the driver may still make available.
    pub fn room(&self) -> u16 {
        self.config.size - self.descs.values().sum::<u16>()
    }

    /// A descriptor as it stands in memory: the address first, then all the rest at once.
    pub fn raw(&self, index: u16, (address, length, flags): Part, id: u16) {
        let at = DESC + 16 * u64::from(index);
        let rest = u64::from(length) | u64::from(id) << 32 | u64::from(flags) << 48;
        self.memory.atomic64(at).unwrap().store(address, SeqCst);
        self.memory.atomic64(at + 8).unwrap().store(rest, SeqCst);
    }

    pub fn flags(&self, index: u16) -> u16 {
        self.load(DESC + 16 * u64::from(index) + 14)
    }

    /// Make a chain available, without a kick: linked, the first descriptor written last.
    pub fn chain(&mut self, parts: &[Part], id: u16) {
        let mut places = Vec::new();
        for (n, &(address, length, flags)) in parts.iter().enumerate() {
            let next = if n + 1 < parts.len() { NEXT } else { 0 };
            places.push((self.next, (address, length, flags | next | self.next.available())));
            self.next.advance(1, self.config.size);
        }
        for &(place, part) in places.iter().rev() {
            self.raw(place.index, part, id);
        }
        self.descs.insert(id, parts.len() as u16);
    }

    /// Make one writable buffer of 16 bytes available.
    pub fn add(&mut self, id: u16) {
        self.chain(&[(BUFFERS + 16 * u64::from(id), 16, WRITE)], id);
    }

    /// The used descriptors since the last call: (id, length).
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        loop {
            let word = self.memory.atomic64(DESC + 16 * u64::from(self.seen.index) + 8).unwrap().load(SeqCst);
            let (length, id, flags) = (word as u32, (word >> 32) as u16, (word >> 48) as u16);
            let both = if self.seen.wrap { AVAILABLE | IS_USED } else { 0 };
            if flags & (AVAILABLE | IS_USED) != both {
                return used;
            }
            let descs = self.descs.remove(&id).unwrap_or(1);
            used.push((id, length));
            let size = self.config.size;
            self.seen.advance(descs, size);
        }
    }

    /// Ask for interrupts as an event suppression structure says.
    pub fn ask(&self, event: Place, flags: u16) {
        self.store(AVAIL, event.encoded());
        self.store(AVAIL + 2, flags);
    }

    /// What the device asks for: where to kick, and the flags.
    pub fn asked(&self) -> (Place, u16) {
        (Place::decoded(self.load(USED)), self.load(USED + 2))
    }

    /// Reset, and start over on a zeroed ring.
    pub fn reset(&mut self) {
        self.vq.stop();
        self.state.reset();
        self.memory.write(DESC, &vec![0; 16 * usize::from(self.config.size)]).unwrap();
        (self.config.next_avail, self.config.next_used) = (FRESH, FRESH);
        (self.next, self.seen) = (Place::decoded(FRESH), Place::decoded(FRESH));
        self.descs.clear();
        self.start_completing();
    }
}
