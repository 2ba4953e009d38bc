//! The ring of a queue, split or packed, and the order of completions.

use std::collections::VecDeque;

use super::packed::PackedRing;
use super::split::SplitRing;
use super::RingConfig;
use crate::chain::Segments;
use crate::dirty_log::Range;
use crate::memory::GuestMemory;
use crate::GuestError;

/// What it takes to give a chain back.
#[derive(Debug, Clone, Copy)]
pub struct Receipt {
    /// The head of a split ring, the buffer id of a packed one.
    pub id: u16,
    /// Descriptors of the ring that it occupies.
    pub descs: u16,
    /// Its turn, where `Order` counts.
    pub ticket: u16,
}

/// A chain that the device is done with.
#[derive(Debug, Clone, Copy)]
pub struct Used {
    pub receipt: Receipt,
    /// Bytes written.
    pub length: u32,
    /// All of its device-writable part was written.
    pub whole: bool,
}

pub enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

/// The same expression for either ring.
macro_rules! either {
    ($self:expr, $ring:ident => $call:expr) => {
        match $self {
            Ring::Split($ring) => $call,
            Ring::Packed($ring) => $call,
        }
    };
}

impl Ring {
    pub fn new(memory: GuestMemory, config: &RingConfig) -> Result<Self, GuestError> {
        if config.packed {
            PackedRing::new(memory, config).map(Self::Packed)
        } else {
            SplitRing::new(memory, config).map(Self::Split)
        }
    }

    /// Go on in other guest memory, at the same addresses.
    pub fn set_memory(&mut self, memory: GuestMemory) -> Result<(), GuestError> {
        either!(self, ring => ring.set_memory(memory))
    }

    pub fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    pub fn memory(&self) -> &GuestMemory {
        either!(self, ring => ring.memory())
    }

    /// Where the device goes on: the next avail and used indexes, of a packed ring with the wrap counters in bit 15.
    pub fn position(&self) -> (u16, u16) {
        either!(self, ring => ring.position())
    }

    /// What of the ring the device writes, if its used ring lay at `used`.
    pub fn written_at(&self, used: u64) -> Vec<Range> {
        either!(self, ring => ring.written_at(used))
    }

    /// Ask for no kicks.
    pub fn suppress(&mut self) {
        either!(self, ring => ring.suppress());
    }

    /// Ask for kicks again; true if something came meanwhile that will not be kicked for.
    pub fn rearm(&mut self) -> bool {
        either!(self, ring => ring.rearm())
    }

    /// At how many places a kick was asked for since the start.
    pub fn asked(&self) -> u64 {
        either!(self, ring => ring.asked())
    }

    /// Whether the driver added something since the handler last looked.
    pub fn has_news(&self) -> bool {
        either!(self, ring => ring.has_news())
    }

    /// Look for work on behalf of the handler; true if there is some.
    pub fn look(&mut self) -> Result<bool, GuestError> {
        either!(self, ring => ring.look())
    }

    /// Take the next chain: how to give it back, and its checked segments.
    #[inline]
    pub fn take(&mut self, inside: bool) -> Result<Option<(Receipt, Segments)>, GuestError> {
        either!(self, ring => ring.take(inside))
    }

    /// Go back to before the chain that was taken last.
    pub fn untake(&mut self, receipt: Receipt) {
        either!(self, ring => ring.untake(receipt));
    }

    /// Write what tells that a chain was used; `publish` makes it known.
    #[inline]
    pub fn put(&mut self, used: Used) {
        either!(self, ring => ring.put(used));
    }

    /// Make known what was put so far; `Some(whether to interrupt)` if there was any. `idle`: nothing is in flight.
    pub fn publish(&mut self, idle: bool) -> Option<bool> {
        either!(self, ring => ring.publish(idle))
    }
}

/// Completions in the order in which the chains were taken, for VIRTIO_F_IN_ORDER.
#[derive(Default)]
pub struct Order {
    /// The ticket of the front.
    first: u16,
    /// The chains that were taken and not given back, each with its completion once that is there.
    waiting: VecDeque<Option<Used>>,
}

impl Order {
    /// A chain was taken; return its ticket.
    pub fn take(&mut self) -> u16 {
        self.waiting.push_back(None);
        self.first.wrapping_add(self.waiting.len() as u16 - 1)
    }

    /// The chain that was taken last was given back unused.
    pub fn untake(&mut self) {
        self.waiting.pop_back();
    }

    /// A chain was completed.
    pub fn put(&mut self, used: Used) {
        let turn = usize::from(used.receipt.ticket.wrapping_sub(self.first));
        if let Some(waiting) = self.waiting.get_mut(turn) {
            *waiting = Some(used);
        }
    }

    /// The next completion whose turn it is.
    pub fn next(&mut self) -> Option<Used> {
        let used = (*self.waiting.front()?)?;
        self.waiting.pop_front();
        self.first = self.first.wrapping_add(1);
        Some(used)
    }
}
