//! The device's half of the notification protocol of a packed ring (virtio 1.3, 2.8.1, 2.8.7, 2.8.10).
//!
//! Generic over the cells it shares with the driver, so that the loom model drives exactly this code.

use crate::sync::{fence, Ordering};

/// Bits of a descriptor's flags: whether it was made available, and used, in which lap.
pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;
const WRITE: u16 = 2;

/// Flags of an event suppression structure; its descriptor event offset and wrap counter are in the low half.
pub const ENABLE: u32 = 0;
pub const DISABLE: u32 = 1 << 16;
pub const DESC: u32 = 2 << 16;
const FLAGS: u32 = 3 << 16;

/// The words that driver and device share.
pub trait PackedCells {
    /// The second half of a descriptor: length, buffer id, flags. Acquire: the first half is visible.
    fn word(&self, index: u16) -> u64;
    fn set_word(&self, index: u16, word: u64);
    /// Release: whatever was written before is visible first.
    fn publish_word(&self, index: u16, word: u64);
    /// The driver event suppression structure.
    fn driver_event(&self) -> u32;
    /// The device event suppression structure: offset, wrap counter and flags change together.
    fn set_device_event(&self, event: u32);
}

/// The driver made more descriptors available than the ring has.
#[derive(Debug, PartialEq, Eq)]
pub struct Surplus;

/// A descriptor in one of two laps: 0..size while the wrap counter is 1, size..2 * size while it is 0.
pub type Place = u32;

/// Where the device stands in a packed ring, and its half of the notification protocol.
pub struct Laps<C> {
    pub cells: C,
    pub size: u16,
    event_idx: bool,
    in_order: bool,
    pub next_avail: Place,
    pub next_used: Place,
    /// The used descriptors from here to `next_used` are not known to the driver.
    published: Place,
    /// The word of the first of them, which is written last.
    first: Option<u64>,
    /// Where the last of them stands, if IN_ORDER allows the next one to stand for both.
    replaceable: Option<Place>,
    /// The first descriptor that was found not to be available.
    seen: Place,
    /// The same as far as the handler knows: whatever comes later needs another look.
    looked: Place,
    /// The places where a kick was asked for, the first one included: with EVENT_IDX no more may come.
    pub asked: u64,
    asked_at: Option<Place>,
    /// `published` at the last interrupt decision; none after a start, so that the first decision signals.
    decided: Option<Place>,
}

impl<C: PackedCells> Laps<C> {
    /// `next_avail` and `next_used` are places below `2 * size`.
    pub fn new(cells: C, size: u16, event_idx: bool, in_order: bool, next_avail: Place, next_used: Place) -> Self {
        Self {
            cells,
            size,
            event_idx,
            in_order,
            next_avail,
            next_used,
            published: next_used,
            first: None,
            replaceable: None,
            seen: next_avail,
            looked: next_avail,
            asked: 1,
            asked_at: Some(next_avail),
            decided: None,
        }
    }

    /// Go on somewhere else, before anything was taken.
    pub fn move_to(&mut self, next_avail: Place, next_used: Place) {
        (self.next_avail, self.seen, self.looked) = (next_avail, next_avail, next_avail);
        self.asked_at = Some(next_avail);
        (self.next_used, self.published) = (next_used, next_used);
    }

    fn size(&self) -> u32 {
        u32::from(self.size)
    }

    pub fn index(&self, place: Place) -> u16 {
        // No division in these: they run for each descriptor.
        (if self.wrap(place) { place } else { place - self.size() }) as u16
    }

    /// The wrap counter there.
    fn wrap(&self, place: Place) -> bool {
        place < self.size()
    }

    /// `n` descriptors on, at most a lap.
    pub fn after(&self, place: Place, n: u16) -> Place {
        let (next, both) = (place + u32::from(n), 2 * self.size());
        if next < both {
            next
        } else {
            next - both
        }
    }

    fn distance(&self, from: Place, to: Place) -> u32 {
        if to >= from {
            to - from
        } else {
            to + 2 * self.size() - from
        }
    }

    /// Index and wrap counter as the specification writes them down: the counter is bit 15.
    pub fn encode(&self, place: Place) -> u16 {
        self.index(place) | u16::from(self.wrap(place)) << 15
    }

    /// The place an index with its wrap counter means; none if the ring has no such index.
    pub fn decode(size: u16, raw: u16) -> Option<Place> {
        let (index, wrap) = (raw & 0x7fff, raw >> 15 != 0);
        (index < size).then(|| u32::from(index) + if wrap { 0 } else { u32::from(size) })
    }

    /// Whether a descriptor with these flags is available to the device at `place`.
    pub fn is_available(&self, place: Place, flags: u16) -> bool {
        let wrap = self.wrap(place);
        (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap
    }

    /// Whether the descriptor there is available to the device.
    pub fn available(&self, place: Place) -> bool {
        self.is_available(place, (self.cells.word(self.index(place)) >> 48) as u16)
    }

    /// Ask for no kicks. With EVENT_IDX a descriptor event that is left behind is enough.
    pub fn suppress(&mut self) {
        if !self.event_idx {
            self.cells.set_device_event(DISABLE);
        }
    }

    /// Ask for kicks again; true if something came meanwhile that will not be kicked for.
    pub fn rearm(&mut self) -> bool {
        self.asked += u64::from(self.asked_at.replace(self.looked) != Some(self.looked));
        let event = if self.event_idx { DESC | u32::from(self.encode(self.looked)) } else { ENABLE };
        self.cells.set_device_event(event);
        // The driver stores a descriptor, then reads what we stored: one of the two must see the other's.
        #[cfg(not(lose_fence))]
        fence(Ordering::SeqCst);
        if cfg!(lose_last_look) {
            return false;
        }
        self.has_news()
    }

    /// Whether the driver added something since the handler last looked.
    pub fn has_news(&self) -> bool {
        // Somebody else may have seen, taken and used what stood at `looked`.
        self.looked != self.seen || self.available(self.seen)
    }

    /// Look for work on behalf of the handler; true if there is some.
    pub fn look(&mut self) -> Result<bool, Surplus> {
        self.refresh()?;
        self.looked = self.seen;
        Ok(self.seen != self.next_avail)
    }

    /// The descriptor to take next. `inside`: asked by the handler, which thereby learns how far the ring goes.
    pub fn next(&mut self, inside: bool) -> Result<Option<Place>, Surplus> {
        if self.next_avail == self.seen {
            self.refresh()?;
            if inside {
                self.looked = self.seen;
            }
        }
        Ok((self.next_avail != self.seen).then_some(self.next_avail))
    }

    /// A chain of `descs` descriptors was taken at `next_avail`; its tail may have come after the last look.
    pub fn taken(&mut self, descs: u16) -> Result<(), Surplus> {
        if self.distance(self.published, self.next_avail) + u32::from(descs) > self.size() {
            return Err(Surplus);
        }
        let beyond = u32::from(descs) > self.distance(self.next_avail, self.seen);
        self.next_avail = self.after(self.next_avail, descs);
        if beyond {
            self.seen = self.next_avail;
        }
        Ok(())
    }

    /// The chain of `descs` descriptors that was taken last is the next to take.
    pub fn untake(&mut self, descs: u16) {
        self.next_avail = (self.next_avail + 2 * self.size() - u32::from(descs)) % (2 * self.size());
    }

    /// See how far the available descriptors go: at most to the end of the ring, whatever the flags say.
    fn refresh(&mut self) -> Result<(), Surplus> {
        while self.available(self.seen) {
            if self.distance(self.published, self.seen) >= self.size() {
                return Err(Surplus);
            }
            self.seen = self.after(self.seen, 1);
        }
        Ok(())
    }

    /// Write the used descriptor of a chain; `publish` makes it known. `whole`: the device used all of its buffer, so
    /// that with IN_ORDER the used descriptor of a later chain may stand for this one too.
    pub fn put(&mut self, id: u16, descs: u16, length: u32, whole: bool) {
        let place = self.replaceable.take().unwrap_or(self.next_used);
        let lap = if self.wrap(place) { AVAIL | USED } else { 0 };
        let flags = lap | if length > 0 { WRITE } else { 0 };
        let word = u64::from(length) | u64::from(id) << 32 | u64::from(flags) << 48;
        if place == self.published && !cfg!(publish_first) {
            self.first = Some(word);
        } else {
            self.cells.set_word(self.index(place), word);
        }
        self.replaceable = (self.in_order && whole).then_some(place);
        self.next_used = self.after(self.next_used, descs);
    }

    /// Make the used descriptors written so far known; `Some(whether to interrupt)` if there were any.
    pub fn publish(&mut self) -> Option<bool> {
        if self.published == self.next_used {
            return None;
        }
        if let Some(word) = self.first.take() {
            self.cells.publish_word(self.index(self.published), word);
        }
        self.published = self.next_used;
        self.replaceable = None;
        // The driver stores its event, then looks at the descriptors: one of the two must see the other's.
        #[cfg(not(lose_fence))]
        fence(Ordering::SeqCst);
        Some(self.decide())
    }

    fn decide(&mut self) -> bool {
        let (new, old) = (self.published, self.decided.replace(self.published));
        let event = self.cells.driver_event();
        match event & FLAGS {
            DISABLE => false,
            DESC if self.event_idx => match (old, Self::decode(self.size, event as u16)) {
                (Some(old), Some(event)) => self.distance(old, event) < self.distance(old, new),
                _ => true,
            },
            _ => true,
        }
    }
}
