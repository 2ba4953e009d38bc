//! The split ring (virtio 1.3, 2.7): descriptors read once and checked, used entries written.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::desc::{check_areas, Desc, Table, DESC_SIZE, INDIRECT, NEXT};
use super::inflight::Inflight;
use super::notify::{Cells, Indexes, Jump};
use super::ring::{Receipt, Used};
use super::RingConfig;
use crate::chain::Segments;
use crate::dirty_log::Range;
use crate::memory::GuestMemory;
use crate::GuestError;

/// The three areas of a ring. The pointers stay valid because `memory` keeps the mapping.
struct Areas {
    memory: GuestMemory,
    desc: *const AtomicU64,
    avail: *const AtomicU16,
    used: *const AtomicU32,
    size: u16,
    /// Guest addresses of the three.
    at: [u64; 3],
}

// SAFETY: the pointers lead to shared memory that is only accessed atomically.
unsafe impl Send for Areas {}
// SAFETY: as above.
unsafe impl Sync for Areas {}

impl Areas {
    fn new(memory: GuestMemory, size: u16, at: [u64; 3]) -> Result<Self, GuestError> {
        let bytes = u64::from(size);
        let (desc, avail, used) = ((at[0], bytes * DESC_SIZE), (at[1], 6 + 2 * bytes), (at[2], 6 + 8 * bytes));
        check_areas([
            ("descriptor table", desc.0, desc.1, 16),
            ("avail ring", avail.0, avail.1, 2),
            ("used ring", used.0, used.1, 4),
        ])?;
        let areas = Self {
            desc: memory.host(desc.0, desc.1)?.cast(),
            avail: memory.host(avail.0, avail.1)?.cast(),
            used: memory.host(used.0, used.1)?.cast(),
            memory,
            size,
            at,
        };
        if !areas.desc.is_aligned() || !areas.avail.is_aligned() || !areas.used.is_aligned() {
            return Err(GuestError("the ring lies in memory that is mapped unaligned".into()));
        }
        Ok(areas)
    }

    /// The avail ring in 16-bit words: flags, idx, ring[size], used_event.
    fn avail(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 3 + usize::from(self.size));
        // SAFETY: `new` checked size + 3 words; callers mask ring entries by the size.
        unsafe { &*self.avail.add(word) }
    }

    /// The used ring in 16-bit words: flags, idx.
    fn used16(&self, word: usize) -> &AtomicU16 {
        // SAFETY: `new` checked the whole used ring; `word` is 0, 1 or the avail event behind the ring.
        unsafe { &*self.used.cast::<AtomicU16>().add(word) }
    }

    fn entry(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }
}

impl Cells for Areas {
    fn avail_idx(&self) -> u16 {
        u16::from_le(self.avail(1).load(Ordering::Acquire))
    }

    fn avail_flags(&self) -> u16 {
        u16::from_le(self.avail(0).load(Ordering::Relaxed))
    }

    fn used_event(&self) -> u16 {
        u16::from_le(self.avail(2 + usize::from(self.size)).load(Ordering::Relaxed))
    }

    fn set_avail_event(&self, index: u16) {
        self.used16(2 + 4 * usize::from(self.size)).store(index.to_le(), Ordering::Relaxed);
    }

    fn set_used_flags(&self, flags: u16) {
        self.used16(0).store(flags.to_le(), Ordering::Relaxed);
    }

    fn set_used_idx(&self, index: u16) {
        self.used16(1).store(index.to_le(), Ordering::Release);
    }
}

pub struct SplitRing {
    indexes: Indexes<Areas>,
    indirect: bool,
    inflight: Option<Inflight>,
}

impl SplitRing {
    pub fn new(memory: GuestMemory, config: &RingConfig) -> Result<Self, GuestError> {
        let RingConfig { size, event_idx, notify_on_empty, next_used, .. } = *config;
        let areas = Areas::new(memory, size, [config.desc, config.avail, config.used])?;
        let open = |region| Inflight::open(region, size, next_used);
        let inflight = config.inflight.as_ref().map(open).transpose()?;
        let taken = |inflight: &Inflight| next_used.wrapping_add(inflight.unfinished());
        let next_avail = inflight.as_ref().map_or(config.next_avail, taken);
        let indexes = Indexes::new(areas, size, event_idx, notify_on_empty, next_avail, next_used);
        Ok(Self { indexes, indirect: config.indirect, inflight })
    }

    /// Go on in other guest memory, at the same addresses.
    pub fn set_memory(&mut self, memory: GuestMemory) -> Result<(), GuestError> {
        let areas = &mut self.indexes.cells;
        *areas = Areas::new(memory, areas.size, areas.at)?;
        Ok(())
    }

    pub fn size(&self) -> u16 {
        self.indexes.size
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.indexes.cells.memory
    }

    /// The next avail and used indexes.
    pub fn position(&self) -> (u16, u16) {
        (self.indexes.next_avail, self.indexes.next_used)
    }

    /// What of the ring the device writes, if its used ring lay at `used`.
    pub fn written_at(&self, used: u64) -> Vec<Range> {
        vec![(used, 6 + 8 * u64::from(self.size()))]
    }

    pub fn suppress(&mut self) {
        self.indexes.suppress();
    }

    pub fn rearm(&mut self) -> bool {
        self.indexes.rearm()
    }

    /// At how many places of the ring a kick was asked for.
    pub fn asked(&self) -> u64 {
        self.indexes.asked
    }

    pub fn has_news(&self) -> bool {
        self.indexes.has_news()
    }

    pub fn look(&mut self) -> Result<bool, GuestError> {
        let news = self.indexes.look().map_err(|jump| self.jumped(jump))?;
        Ok(news || self.inflight.as_ref().is_some_and(|inflight| inflight.unfinished() > 0))
    }

    pub fn publish(&mut self, idle: bool) -> Option<bool> {
        let decision = self.indexes.publish(idle)?;
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.indexes.next_used);
        }
        Some(decision)
    }

    fn jumped(&self, Jump(ahead): Jump) -> GuestError {
        GuestError(format!("the avail index is {ahead} entries ahead (the queue has {})", self.size()))
    }

    /// Take the next chain: how to give it back, and its checked segments.
    pub fn take(&mut self, inside: bool) -> Result<Option<(Receipt, Segments)>, GuestError> {
        let Some(head) = self.next_head(inside)? else {
            return Ok(None);
        };
        let segments = self.walk(head).map_err(|error| GuestError(format!("head {head}: {error}")))?;
        if let Some(inflight) = &mut self.inflight {
            inflight.take(head);
        }
        Ok(Some((Receipt { id: head, descs: 1, ticket: 0 }, segments)))
    }

    /// What is to be done again comes first.
    fn next_head(&mut self, inside: bool) -> Result<Option<u16>, GuestError> {
        if let Some(head) = self.inflight.as_mut().and_then(Inflight::again) {
            return Ok(Some(head));
        }
        let Some(index) = self.indexes.take(inside).map_err(|jump| self.jumped(jump))? else {
            return Ok(None);
        };
        let areas = &self.indexes.cells;
        let head = u16::from_le(areas.avail(2 + areas.entry(index)).load(Ordering::Relaxed));
        if head >= areas.size {
            return Err(GuestError(format!("head {head} is past the descriptor table ({} entries)", areas.size)));
        }
        Ok(Some(head))
    }

    pub fn untake(&mut self, receipt: Receipt) {
        match &mut self.inflight {
            // It stays noted as in flight, wherever the device stops.
            Some(inflight) => inflight.untake(receipt.id),
            None => self.indexes.untake(),
        }
    }

    fn walk(&self, head: u16) -> Result<Segments, GuestError> {
        let mut segments = Segments::default();
        let mut index = head;
        for _ in 0..self.size() {
            let desc = self.desc(index)?;
            if desc.flags & INDIRECT != 0 {
                self.walk_table(&desc, index, &mut segments)?;
                return Ok(segments);
            }
            self.push(&mut segments, &desc, index)?;
            if desc.flags & NEXT == 0 {
                return Ok(segments);
            }
            index = desc.link;
        }
        Err(GuestError(format!("the chain is longer than the queue ({} entries)", self.size())))
    }

    /// An entry of the descriptor table: two 64-bit loads, each a consistent snapshot.
    fn desc(&self, index: u16) -> Result<Desc, GuestError> {
        if index >= self.size() {
            return Err(GuestError(format!("next {index} is past the descriptor table ({} entries)", self.size())));
        }
        // SAFETY: `new` checked `size` descriptors of two words.
        let words = unsafe {
            [
                &*self.indexes.cells.desc.add(2 * usize::from(index)),
                &*self.indexes.cells.desc.add(2 * usize::from(index) + 1),
            ]
        };
        let [address, rest] = words.map(|word| u64::from_le(word.load(Ordering::Relaxed)));
        Ok(Desc::split(address, rest))
    }

    fn push(&self, segments: &mut Segments, desc: &Desc, index: u16) -> Result<(), GuestError> {
        desc.push(self.memory(), segments).map_err(|error| GuestError(format!("descriptor {index}: {error}")))
    }

    fn walk_table(&self, desc: &Desc, at: u16, segments: &mut Segments) -> Result<(), GuestError> {
        let table = Table::new(self.memory(), desc, self.size(), self.indirect)
            .map_err(|error| GuestError(format!("descriptor {at}: {error}")))?;
        let mut index = 0;
        for _ in 0..table.entries {
            if index >= table.entries {
                return Err(GuestError(format!("indirect next {index} is past its table ({} entries)", table.entries)));
            }
            let desc = table.desc(self.memory(), index, Desc::split)?;
            self.push(segments, &desc, index)?;
            if desc.flags & NEXT == 0 {
                return Ok(());
            }
            index = desc.link;
        }
        Err(GuestError(format!("the indirect chain is longer than its table ({} entries)", table.entries)))
    }

    /// Write a used entry; `publish` makes it known.
    pub fn put(&mut self, used: Used) {
        let entry = 1 + 2 * self.indexes.cells.entry(self.indexes.next_used);
        // SAFETY: `new` checked one word and `size` entries of two words, and `entry` masks by the size.
        let words = unsafe { [&*self.indexes.cells.used.add(entry), &*self.indexes.cells.used.add(entry + 1)] };
        words[0].store(u32::from(used.receipt.id).to_le(), Ordering::Relaxed);
        words[1].store(used.length.to_le(), Ordering::Relaxed);
        self.indexes.next_used = self.indexes.next_used.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.put(used.receipt.id);
        }
    }
}
