//! The packed ring (virtio 1.3, 2.8): one ring of descriptors that the driver makes available and the device uses.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::desc::{check_areas, Desc, Table, DESC_SIZE, INDIRECT, NEXT};
use super::inflight_packed::PackedInflight;
use super::laps::{Laps, PackedCells, Place, Surplus};
use super::ring::{Receipt, Used};
use super::RingConfig;
use crate::chain::Segments;
use crate::dirty_log::Range;
use crate::memory::GuestMemory;
use crate::GuestError;

/// Bytes of an event suppression structure.
const EVENT_SIZE: u64 = 4;

/// The ring and the two event suppression structures. The pointers stay valid because `memory` keeps the mapping.
struct Areas {
    memory: GuestMemory,
    desc: *const AtomicU64,
    driver: *const AtomicU32,
    device: *const AtomicU32,
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
        let bytes = u64::from(size) * DESC_SIZE;
        check_areas([
            ("descriptor ring", at[0], bytes, 16),
            ("driver event suppression", at[1], EVENT_SIZE, 4),
            ("device event suppression", at[2], EVENT_SIZE, 4),
        ])?;
        let areas = Self {
            desc: memory.host(at[0], bytes)?.cast(),
            driver: memory.host(at[1], EVENT_SIZE)?.cast(),
            device: memory.host(at[2], EVENT_SIZE)?.cast(),
            memory,
            size,
            at,
        };
        if !areas.desc.is_aligned() || !areas.driver.is_aligned() || !areas.device.is_aligned() {
            return Err(GuestError("the ring lies in memory that is mapped unaligned".into()));
        }
        Ok(areas)
    }

    /// Address, and then length, buffer id and flags of a descriptor.
    fn half(&self, index: u16, second: bool) -> &AtomicU64 {
        debug_assert!(index < self.size);
        // SAFETY: `new` checked `size` descriptors of two words, and `Laps::index` is below `size`.
        unsafe { &*self.desc.add(2 * usize::from(index) + usize::from(second)) }
    }
}

impl PackedCells for Areas {
    fn word(&self, index: u16) -> u64 {
        u64::from_le(self.half(index, true).load(Ordering::Acquire))
    }

    fn set_word(&self, index: u16, word: u64) {
        self.half(index, true).store(word.to_le(), Ordering::Relaxed);
    }

    fn publish_word(&self, index: u16, word: u64) {
        self.half(index, true).store(word.to_le(), Ordering::Release);
    }

    fn driver_event(&self) -> u32 {
        // SAFETY: `new` checked it.
        u32::from_le(unsafe { &*self.driver }.load(Ordering::Relaxed))
    }

    fn set_device_event(&self, event: u32) {
        // SAFETY: `new` checked it.
        unsafe { &*self.device }.store(event.to_le(), Ordering::Relaxed);
    }
}

pub struct PackedRing {
    laps: Laps<Areas>,
    indirect: bool,
    inflight: Option<PackedInflight>,
}

impl PackedRing {
    pub fn new(memory: GuestMemory, config: &RingConfig) -> Result<Self, GuestError> {
        let RingConfig { size, event_idx, in_order, next_avail, next_used, .. } = *config;
        let areas = Areas::new(memory, size, [config.desc, config.avail, config.used])?;
        let place = |raw: u16| {
            let past = || GuestError(format!("index {} is past the ring ({size} entries)", raw & 0x7fff));
            Laps::<Areas>::decode(size, raw).ok_or_else(past)
        };
        let laps = Laps::new(areas, size, event_idx, in_order, place(next_avail)?, place(next_used)?);
        let mut ring = Self { laps, indirect: config.indirect, inflight: None };
        if let Some(region) = &config.inflight {
            let told = |used| place(used).is_ok_and(|used| !ring.laps.available(used));
            let inflight = PackedInflight::open(region, size, next_used, told)?;
            if let Some((used, descs)) = inflight.position() {
                let used = place(used)?;
                ring.laps.move_to(ring.laps.after(used, descs), used);
            }
            ring.inflight = Some(inflight);
        }
        Ok(ring)
    }

    /// Go on in other guest memory, at the same addresses.
    pub fn set_memory(&mut self, memory: GuestMemory) -> Result<(), GuestError> {
        let areas = &mut self.laps.cells;
        *areas = Areas::new(memory, areas.size, areas.at)?;
        Ok(())
    }

    pub fn size(&self) -> u16 {
        self.laps.size
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.laps.cells.memory
    }

    /// The next available and the next used descriptor, each with its wrap counter in bit 15.
    pub fn position(&self) -> (u16, u16) {
        (self.laps.encode(self.laps.next_avail), self.laps.encode(self.laps.next_used))
    }

    /// What of the ring the device writes. The log's place for a used ring means nothing here.
    pub fn written_at(&self, _used: u64) -> Vec<Range> {
        let [desc, _, device] = self.laps.cells.at;
        vec![(desc, u64::from(self.size()) * DESC_SIZE), (device, EVENT_SIZE)]
    }

    pub fn suppress(&mut self) {
        self.laps.suppress();
    }

    pub fn rearm(&mut self) -> bool {
        self.laps.rearm()
    }

    /// At how many places of the ring a kick was asked for.
    pub fn asked(&self) -> u64 {
        self.laps.asked
    }

    pub fn has_news(&self) -> bool {
        self.laps.has_news()
    }

    pub fn look(&mut self) -> Result<bool, GuestError> {
        let news = self.laps.look().map_err(|surplus| self.too_many(surplus))?;
        Ok(news || self.inflight.as_ref().is_some_and(PackedInflight::is_unfinished))
    }

    pub fn publish(&mut self, _idle: bool) -> Option<bool> {
        if let Some(inflight) = &mut self.inflight {
            inflight.publishing(self.laps.encode(self.laps.next_used));
        }
        let decision = self.laps.publish()?;
        if let Some(inflight) = &mut self.inflight {
            inflight.published();
        }
        Some(decision)
    }

    fn too_many(&self, _: Surplus) -> GuestError {
        GuestError(format!("more descriptors available or in flight than the ring has ({})", self.size()))
    }

    /// Take the next chain: how to give it back, and its checked segments.
    pub fn take(&mut self, inside: bool) -> Result<Option<(Receipt, Segments)>, GuestError> {
        if let Some(again) = self.take_again()? {
            return Ok(Some(again));
        }
        let Some(place) = self.laps.next(inside).map_err(|surplus| self.too_many(surplus))? else {
            return Ok(None);
        };
        let first = self.laps.index(place);
        let tracked = self.inflight.is_some();
        let mut noted = Vec::new();
        let next = |place| {
            let desc = self.desc(place)?;
            noted.extend(tracked.then_some(desc));
            Ok(desc)
        };
        let (id, descs, segments) =
            self.walk(place, next).map_err(|error| GuestError(format!("chain at {first}: {error}")))?;
        self.laps.taken(descs).map_err(|surplus| self.too_many(surplus))?;
        if let Some(inflight) = &mut self.inflight {
            inflight.take(id, noted)?;
        }
        Ok(Some((Receipt { id, descs, ticket: 0 }, segments)))
    }

    pub fn untake(&mut self, receipt: Receipt) {
        match &mut self.inflight {
            // It stays noted as in flight, wherever the device stops.
            Some(inflight) => inflight.untake(receipt.id),
            None => self.laps.untake(receipt.descs),
        }
    }

    /// What an earlier process took and never gave back comes first, from its descriptors as it noted them.
    fn take_again(&mut self) -> Result<Option<(Receipt, Segments)>, GuestError> {
        let Some(chain) = self.inflight.as_mut().and_then(PackedInflight::again) else {
            return Ok(None);
        };
        let mut noted = chain.descs.iter();
        let next = |_| noted.next().copied().ok_or_else(|| GuestError("a chain that was noted has no end".into()));
        let (id, descs, segments) = self.walk(0, next)?;
        if let Some(inflight) = &mut self.inflight {
            inflight.resumed(id, chain)?;
        }
        Ok(Some((Receipt { id, descs, ticket: 0 }, segments)))
    }

    /// Buffer id, number of descriptors and segments of the chain that starts there and that `next` reads.
    fn walk(
        &self,
        start: Place,
        mut next: impl FnMut(Place) -> Result<Desc, GuestError>,
    ) -> Result<(u16, u16, Segments), GuestError> {
        let mut segments = Segments::default();
        let mut place = start;
        for descs in 1..=self.size() {
            let desc = next(place)?;
            if desc.flags & INDIRECT != 0 {
                self.walk_table(&desc, descs > 1, &mut segments).map_err(|error| self.at(place, &error))?;
            } else {
                desc.push(self.memory(), &mut segments).map_err(|error| self.at(place, &error))?;
            }
            if desc.flags & NEXT == 0 {
                return self.checked_id(desc.link).map(|id| (id, descs, segments));
            }
            place = self.laps.after(place, 1);
        }
        Err(GuestError(format!("the chain is longer than the ring ({} entries)", self.size())))
    }

    fn at(&self, place: Place, error: &GuestError) -> GuestError {
        GuestError(format!("descriptor {}: {error}", self.laps.index(place)))
    }

    /// The buffer id is what the driver knows the chain by; only that of the last descriptor counts.
    fn checked_id(&self, id: u16) -> Result<u16, GuestError> {
        if id >= self.size() {
            return Err(GuestError(format!("buffer id {id} is past the ring ({} entries)", self.size())));
        }
        Ok(id)
    }

    /// A descriptor that must be available: its flags in one load with length and id, then the address.
    fn desc(&self, place: Place) -> Result<Desc, GuestError> {
        let (cells, index) = (&self.laps.cells, self.laps.index(place));
        let rest = cells.word(index);
        let desc = Desc::packed(u64::from_le(cells.half(index, false).load(Ordering::Relaxed)), rest);
        if !self.laps.is_available(place, desc.flags) {
            return Err(GuestError(format!("descriptor {index} is not available (flags {:#x})", desc.flags)));
        }
        Ok(desc)
    }

    /// All entries of the table are the chain; their flags say only who writes (2.8.8).
    fn walk_table(&self, desc: &Desc, behind: bool, segments: &mut Segments) -> Result<(), GuestError> {
        if behind {
            return Err(GuestError("an indirect table behind other descriptors".into()));
        }
        let table = Table::new(self.memory(), desc, self.size(), self.indirect)?;
        for index in 0..table.entries {
            let desc = table.desc(self.memory(), index, Desc::packed)?;
            desc.push(self.memory(), segments)
                .map_err(|error| GuestError(format!("indirect descriptor {index}: {error}")))?;
        }
        Ok(())
    }

    /// Write a used descriptor; `publish` makes it known.
    pub fn put(&mut self, used: Used) {
        self.laps.put(used.receipt.id, used.receipt.descs, used.length, used.whole);
        if let Some(inflight) = &mut self.inflight {
            inflight.put(used.receipt.id);
        }
    }
}
