//! The device's half of the notification protocol: no kick and no interrupt is lost (virtio 1.3, 2.7.7, 2.7.10).
//!
//! Generic over the cells it shares with the driver, so that the loom model drives exactly this code.

use crate::sync::{fence, Ordering};

/// `used.flags`: the driver need not kick.
pub const NO_NOTIFY: u16 = 1;
/// `avail.flags`: the device need not interrupt.
pub const NO_INTERRUPT: u16 = 1;

/// The words that driver and device share besides the rings' entries.
pub trait Cells {
    /// Acquire: the entries below it are visible.
    fn avail_idx(&self) -> u16;
    fn avail_flags(&self) -> u16;
    fn used_event(&self) -> u16;
    fn set_avail_event(&self, index: u16);
    fn set_used_flags(&self, flags: u16);
    /// Release: the entries below it are visible first.
    fn set_used_idx(&self, index: u16);
}

/// The avail index ran ahead by more entries than the ring has.
#[derive(Debug, PartialEq, Eq)]
pub struct Jump(pub u16);

/// Where the device stands in a split ring, and its half of the notification protocol.
pub struct Indexes<C> {
    pub cells: C,
    pub size: u16,
    pub event_idx: bool,
    pub notify_on_empty: bool,
    pub next_avail: u16,
    /// Entries written to the used ring, of which the driver knows those below `published`.
    pub next_used: u16,
    published: u16,
    /// The avail index up to which entries may be taken.
    seen: u16,
    /// The avail index the handler knows of: whatever comes later needs another look.
    looked: u16,
    /// The places where a kick was asked for, the first one included: with EVENT_IDX no more may come.
    pub asked: u64,
    asked_at: Option<u16>,
    /// The used index of the last interrupt decision; none after a start, so that the first decision signals.
    decided: Option<u16>,
}

impl<C: Cells> Indexes<C> {
    pub fn new(cells: C, size: u16, event_idx: bool, notify_on_empty: bool, next_avail: u16, next_used: u16) -> Self {
        Self {
            cells,
            size,
            event_idx,
            notify_on_empty,
            next_avail,
            next_used,
            published: next_used,
            seen: next_avail,
            looked: next_avail,
            asked: 1,
            asked_at: Some(next_avail),
            decided: None,
        }
    }

    /// Ask for no kicks. With EVENT_IDX an avail event that is left behind is enough.
    pub fn suppress(&mut self) {
        if !self.event_idx {
            self.cells.set_used_flags(NO_NOTIFY);
        }
    }

    /// Ask for kicks again; true if something came meanwhile that will not be kicked for.
    pub fn rearm(&mut self) -> bool {
        self.asked += u64::from(self.asked_at.replace(self.looked) != Some(self.looked));
        if self.event_idx {
            self.cells.set_avail_event(self.looked);
        } else {
            self.cells.set_used_flags(0);
        }
        // The driver stores its index, then reads what we stored: one of the two must see the other's.
        #[cfg(not(lose_fence))]
        fence(Ordering::SeqCst);
        if cfg!(lose_last_look) {
            return false;
        }
        self.has_news()
    }

    /// Whether the driver added something since the handler last looked.
    pub fn has_news(&self) -> bool {
        self.cells.avail_idx() != self.looked
    }

    /// Look for work on behalf of the handler; true if there is some.
    pub fn look(&mut self) -> Result<bool, Jump> {
        self.refresh()?;
        self.looked = self.seen;
        Ok(self.seen != self.next_avail)
    }

    /// The avail entry to take next. `inside`: asked by the handler, which thereby learns how far the ring goes.
    pub fn take(&mut self, inside: bool) -> Result<Option<u16>, Jump> {
        if self.next_avail == self.seen {
            self.refresh()?;
            if inside {
                self.looked = self.seen;
            }
            if self.next_avail == self.seen {
                return Ok(None);
            }
        }
        let index = self.next_avail;
        self.next_avail = index.wrapping_add(1);
        Ok(Some(index))
    }

    /// The entry that was taken last is the next to take.
    pub fn untake(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    fn refresh(&mut self) -> Result<(), Jump> {
        let avail = self.cells.avail_idx();
        let ahead = avail.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(Jump(ahead));
        }
        self.seen = avail;
        Ok(())
    }

    /// Make the used entries written so far known; `Some(whether to interrupt)` if there were any.
    pub fn publish(&mut self, idle: bool) -> Option<bool> {
        if self.published == self.next_used {
            return None;
        }
        self.cells.set_used_idx(self.next_used);
        self.published = self.next_used;
        // The driver stores its used event, then looks at the used index: one of the two must see the other's.
        #[cfg(not(lose_fence))]
        fence(Ordering::SeqCst);
        Some(self.decide(idle))
    }

    /// `idle`: nothing is in flight.
    fn decide(&mut self, idle: bool) -> bool {
        let (new, old) = (self.published, self.decided.replace(self.published));
        if self.notify_on_empty && idle && self.cells.avail_idx() == self.next_avail {
            return true;
        }
        if !self.event_idx {
            return self.cells.avail_flags() & NO_INTERRUPT == 0;
        }
        let event = self.cells.used_event();
        old.is_none_or(|old| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }
}
