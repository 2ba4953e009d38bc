//! Requests in flight of a packed ring, noted with their descriptors: the ring's own are overwritten when others complete
//! first (vhost-user, "Inflight I/O tracking").

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use super::desc::Desc;
use super::inflight::{garbage, InflightRegion, VERSION};
use crate::memory::GuestMemory;
use crate::GuestError;

const HEADER_WORDS: usize = 4;
const ENTRY_WORDS: usize = 4;
const IN_FLIGHT: u64 = 0xff;
const WRAP: u16 = 1 << 15;

/// Words of the header. Each is stored at once, so that a kill leaves no half of it.
/// Version, entries, free_head, old_free_head.
const FREE: usize = 1;
/// used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter.
const USED: usize = 2;

/// A chain with its descriptors, and the first and last of its entries.
pub struct Noted {
    first: u16,
    last: u16,
    pub descs: Vec<Desc>,
}

/// The notes about a packed ring: one entry for each descriptor of a chain, linked. What is read back is read once, when
/// they are opened; from then on the links are kept in this process too. Only touched with the queue's lock held.
pub struct PackedInflight {
    /// Keeps `words` mapped.
    _memory: GuestMemory,
    words: *const AtomicU64,
    entries: u16,
    /// The next entry of the free list, or of a chain; `entries` ends the free list.
    next: Vec<u16>,
    free: u16,
    /// Where the ring goes on giving back.
    used: u16,
    counter: u64,
    /// The chain in flight with a buffer id.
    chains: Vec<Option<Noted>>,
    /// Chains that have been written to the ring since the driver last was told.
    batch: Vec<(u16, u16)>,
    /// What an earlier process took and never gave back, or a handler did not need, in that order.
    again: VecDeque<Noted>,
    /// Whether there were notes already.
    resumes: bool,
}

// SAFETY: the pointer leads to shared memory that is only accessed atomically, and that `_memory` keeps mapped.
unsafe impl Send for PackedInflight {}
// SAFETY: as above.
unsafe impl Sync for PackedInflight {}

impl PackedInflight {
    /// Take over what the region says of a ring of `size` entries. `used` is where a ring without notes goes on; `told`
    /// says of a place whether the driver has got the descriptor there back. Places have the wrap counter in bit 15.
    pub fn open(region: &InflightRegion, size: u16, used: u16, told: impl Fn(u16) -> bool) -> Result<Self, GuestError> {
        let words: *const AtomicU64 = region.words(size)?.cast();
        let entries = region.entries;
        let mut inflight = Self {
            _memory: region.memory.clone(),
            words,
            entries,
            next: (1..=entries).collect(),
            free: 0,
            used,
            counter: 0,
            chains: (0..size).map(|_| None).collect(),
            batch: Vec::new(),
            again: VecDeque::new(),
            resumes: false,
        };
        let header = inflight.header(FREE).load(Ordering::Acquire);
        match (header as u16, (header >> 16) as u16) {
            (0, _) => inflight.begin(used),
            (VERSION, there) if there == entries => inflight.take_over(size, header, told)?,
            (VERSION, there) => return Err(garbage(&format!("it says that it has {there} entries, not {entries}"))),
            (version, _) => return Err(garbage(&format!("version {version}; only {VERSION} is known"))),
        }
        Ok(inflight)
    }

    fn begin(&self, used: u16) {
        for entry in 0..self.entries {
            self.word(entry, 0).store(u64::from(self.next[usize::from(entry)]) << 16, Ordering::Release);
        }
        self.set_used(used, used);
        self.set_free(self.free, self.free);
    }

    fn take_over(&mut self, size: u16, header: u64, told: impl Fn(u16) -> bool) -> Result<(), GuestError> {
        let word = self.header(USED).load(Ordering::Acquire);
        let place = |index: u64, wrap: u64| index as u16 & !WRAP | (wrap as u16 & 1) << 15;
        let (new, old) = (place(word, word >> 32), place(word >> 16, word >> 40));
        for used in [new, old] {
            if used & !WRAP >= size {
                return Err(garbage(&format!("its used index {} is past the ring ({size} entries)", used & !WRAP)));
            }
        }
        let published = new != old && told(old);
        self.used = if published { new } else { old };
        self.free = (header >> if published { 32 } else { 48 }) as u16;
        self.set_free(self.free, self.free);
        self.set_used(self.used, self.used);
        let free = self.free_list()?;
        self.resumes = true;
        self.find_unfinished(size, &free)
    }

    /// Which entries are free; their marks may be older than that.
    fn free_list(&mut self) -> Result<Vec<bool>, GuestError> {
        let mut free = vec![false; self.entries.into()];
        let mut entry = self.free;
        while entry != self.entries {
            match free.get_mut(usize::from(entry)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(garbage(&format!("its free list leads to entry {entry}, past the end or again"))),
            }
            let state = self.word(entry, 0).fetch_and(!IN_FLIGHT, Ordering::AcqRel);
            self.next[usize::from(entry)] = (state >> 16) as u16;
            entry = (state >> 16) as u16;
        }
        Ok(free)
    }

    fn find_unfinished(&mut self, size: u16, free: &[bool]) -> Result<(), GuestError> {
        let mut taken = free.to_vec();
        let mut found = Vec::new();
        for entry in (0..self.entries).filter(|&entry| !free[usize::from(entry)]) {
            let state = self.word(entry, 0).load(Ordering::Acquire);
            if state & IN_FLIGHT != 0 {
                let chain = self.chain(entry, state, &mut taken)?;
                found.push((self.word(entry, 1).load(Ordering::Relaxed), chain));
            }
        }
        let descs: usize = found.iter().map(|(_, chain)| chain.descs.len()).sum();
        if descs > usize::from(size) || taken.contains(&false) {
            return Err(garbage(&format!("{descs} descriptors in flight, and others neither that nor free")));
        }
        found.sort_by_key(|&(counter, ref chain)| (counter, chain.first));
        self.counter = found.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        self.again = found.into_iter().map(|(_, chain)| chain).collect();
        Ok(())
    }

    /// The chain whose first entry has that state.
    fn chain(&mut self, first: u16, state: u64, taken: &mut [bool]) -> Result<Noted, GuestError> {
        let (last, count) = ((state >> 32) as u16, (state >> 48) as u16);
        let (mut entry, mut next) = (first, (state >> 16) as u16);
        let mut descs = Vec::new();
        for _ in 0..count {
            match taken.get_mut(usize::from(entry)) {
                Some(seen) if !*seen => *seen = true,
                _ => {
                    return Err(garbage(&format!("the chain of entry {first} leads to {entry}, which is not its own")))
                }
            }
            let (rest, address) = (self.word(entry, 2), self.word(entry, 3));
            descs.push(Desc::packed(address.load(Ordering::Relaxed), noted(rest.load(Ordering::Relaxed))));
            self.next[usize::from(entry)] = next;
            if entry == last || descs.len() == usize::from(count) {
                break;
            }
            entry = next;
            next = self.next_of(entry);
        }
        if count == 0 || entry != last || descs.len() != usize::from(count) {
            return Err(garbage(&format!("the chain of entry {first} has not {count} descriptors up to entry {last}")));
        }
        Ok(Noted { first, last, descs })
    }

    fn next_of(&self, entry: u16) -> u16 {
        if entry < self.entries {
            (self.word(entry, 0).load(Ordering::Relaxed) >> 16) as u16
        } else {
            self.entries
        }
    }

    /// Where a ring goes on that has notes: the next used place, with the wrap counter in bit 15, and how many
    /// descriptors behind it are in flight.
    pub fn position(&self) -> Option<(u16, u16)> {
        let descs = self.again.iter().map(|chain| chain.descs.len() as u16).sum();
        self.resumes.then_some((self.used, descs))
    }

    /// Whether an earlier process left something that is still to be done again.
    pub fn is_unfinished(&self) -> bool {
        !self.again.is_empty()
    }

    /// The next request that is to be done again; `resumed` follows.
    pub fn again(&mut self) -> Option<Noted> {
        self.again.pop_front()
    }

    /// The request with that buffer id is in flight again.
    pub fn resumed(&mut self, id: u16, chain: Noted) -> Result<(), GuestError> {
        match self.chains.get_mut(usize::from(id)) {
            Some(place @ None) => *place = Some(chain),
            _ => return Err(GuestError(format!("buffer id {id} is in flight already"))),
        }
        Ok(())
    }

    /// The request was not needed after all: it is the next to be done again.
    pub fn untake(&mut self, id: u16) {
        if let Some(chain) = self.chains.get_mut(usize::from(id)).and_then(Option::take) {
            self.again.push_front(chain);
        }
    }

    /// The request was taken.
    pub fn take(&mut self, id: u16, descs: Vec<Desc>) -> Result<(), GuestError> {
        let (first, mut last, mut free) = (self.free, self.free, self.free);
        for desc in &descs {
            if free >= self.entries {
                return Err(GuestError(format!("more than {} descriptors in flight", self.entries)));
            }
            self.word(free, 3).store(desc.address, Ordering::Release);
            self.word(free, 2).store(noted(desc.packed_rest()), Ordering::Release);
            (last, free) = (free, self.next[usize::from(free)]);
        }
        let count = descs.len() as u64;
        self.resumed(id, Noted { first, last, descs })?;
        self.word(first, 1).store(self.counter, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
        let (next, last) = (u64::from(self.next[usize::from(first)]), u64::from(last));
        self.word(first, 0).store(1 | next << 16 | last << 32 | count << 48, Ordering::Release);
        self.free = free;
        self.set_free(free, free);
        Ok(())
    }

    /// The request was written to the ring, of which the driver will be told. Its entries are not free before that.
    pub fn put(&mut self, id: u16) {
        if let Some(chain) = self.chains.get_mut(usize::from(id)).and_then(Option::take) {
            self.batch.push((chain.first, chain.last));
        }
    }

    /// The driver is about to be told of everything up to `used`.
    pub fn publishing(&mut self, used: u16) {
        let old = self.free;
        for &(first, last) in &self.batch {
            self.next[usize::from(last)] = self.free;
            let state = self.word(last, 0);
            let kept = state.load(Ordering::Relaxed) & !(0xffff << 16);
            state.store(kept | u64::from(self.free) << 16, Ordering::Release);
            self.free = first;
        }
        self.set_free(self.free, old);
        self.set_used(used, self.used);
        self.used = used;
    }

    /// The driver has been told.
    pub fn published(&mut self) {
        while let Some((first, _)) = self.batch.pop() {
            let state = self.word(first, 0);
            state.store(state.load(Ordering::Relaxed) & !IN_FLIGHT, Ordering::Release);
        }
        self.set_free(self.free, self.free);
        self.set_used(self.used, self.used);
    }

    /// `old` is what holds until the driver has been told.
    fn set_free(&self, free: u16, old: u16) {
        let word = u64::from(VERSION) | u64::from(self.entries) << 16 | u64::from(free) << 32 | u64::from(old) << 48;
        self.header(FREE).store(word, Ordering::Release);
    }

    fn set_used(&self, used: u16, old: u16) {
        let indexes = u64::from(used & !WRAP) | u64::from(old & !WRAP) << 16;
        let wraps = u64::from(used >> 15) << 32 | u64::from(old >> 15) << 40;
        self.header(USED).store(indexes | wraps, Ordering::Release);
    }

    fn header(&self, word: usize) -> &AtomicU64 {
        debug_assert!(word < HEADER_WORDS);
        // SAFETY: `open` checked the header, and `_memory` keeps it mapped.
        unsafe { &*self.words.add(word) }
    }

    /// A word of an entry: mark, next, last and number; counter; id, flags and length; address.
    fn word(&self, entry: u16, word: usize) -> &AtomicU64 {
        debug_assert!(entry < self.entries);
        // SAFETY: `open` checked four words for each of `entries` entries; callers have checked the entry.
        unsafe { &*self.words.add(HEADER_WORDS + ENTRY_WORDS * usize::from(entry) + word) }
    }
}

/// The notes have id, flags and length in another order than a ring (length, id, flags); this goes either way.
fn noted(rest: u64) -> u64 {
    rest.rotate_left(32)
}
