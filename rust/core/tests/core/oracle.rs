//! Well-formed chains, popped and completed by the crate `virtio-queue` and by us: both must see and do the same.

use std::fs::OpenOptions;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use pyvirtio_core::chain::Segment;
use pyvirtio_core::{GuestMemory, RingConfig};
use virtio_queue::desc::{split::Descriptor, RawDescriptor};
use virtio_queue::mock::{DescriptorTable, MockSplitQueue};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::driver::{Closure, Driver, BORDER, END, INDIRECT, NEXT, WRITE};

const TABLES: u64 = 0x8000;
/// The used rings lie apart: each side writes its own, and the mock's overlaps its avail ring.
const OUR_USED: u64 = 0x6000;
const THEIR_USED: u64 = 0x7000;
const BUFFERS: u64 = 0xf_0000;
const SIZE: u16 = 32;
/// The used index and the entries.
const USED_BYTES: usize = 2 + 8 * SIZE as usize;

/// One chain: its buffers' lengths, how many of them are readable, how many lie in an indirect table.
#[derive(Debug, Clone)]
struct Shape {
    lengths: Vec<u32>,
    readable: usize,
    indirect: usize,
    written: u32,
}

#[derive(Debug, Clone)]
struct Batch {
    shapes: Vec<Shape>,
    used_event: u16,
}

fn shape() -> impl Strategy<Value = Shape> {
    let lengths = prop::collection::vec(0u32..3000, 1..6);
    (lengths, 0usize..6, 0usize..6, any::<u32>()).prop_map(|(lengths, readable, indirect, written)| Shape {
        readable: readable.min(lengths.len()),
        indirect: indirect.min(lengths.len()),
        lengths,
        written,
    })
}

fn batch() -> impl Strategy<Value = Batch> {
    (prop::collection::vec(shape(), 0..5), 0u16..6).prop_map(|(shapes, used_event)| Batch { shapes, used_event })
}

/// The same file as vm-memory maps it for the oracle.
fn oracles_view(memory: &GuestMemory) -> GuestMemoryMmap {
    let ranges: Vec<_> = memory
        .regions()
        .map(|region| {
            let path = format!("/proc/self/fd/{}", region.fd);
            let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
            let offset = Some(FileOffset::new(file, region.offset));
            (GuestAddress(region.address), region.size as usize, offset)
        })
        .collect();
    GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
}

/// Lays chains out in descriptors picked in a shuffled order.
struct Layout<'a> {
    mock: &'a MockSplitQueue<'a, GuestMemoryMmap>,
    memory: &'a GuestMemoryMmap,
    order: Vec<u16>,
    next: usize,
    tables: u64,
    buffers: u64,
}

impl Layout<'_> {
    fn pick(&mut self) -> u16 {
        self.next += 1;
        self.order[(self.next - 1) % self.order.len()]
    }

    fn buffer(&mut self, shape: &Shape, index: usize, next: u16, last: bool) -> RawDescriptor {
        let length = shape.lengths[index];
        if self.buffers + u64::from(length) > END {
            self.buffers = BUFFERS;
        }
        let flags = if index < shape.readable { 0 } else { WRITE } | if last { 0 } else { NEXT };
        let desc = Descriptor::new(self.buffers, length, flags, next);
        self.buffers += u64::from(length);
        desc.into()
    }

    /// Write the descriptors of one chain and return its head.
    fn add(&mut self, shape: &Shape) -> u16 {
        let direct = shape.lengths.len() - shape.indirect;
        let indexes: Vec<u16> = (0..direct + usize::from(shape.indirect > 0)).map(|_| self.pick()).collect();
        for place in 0..direct {
            let next = indexes.get(place + 1).copied();
            let desc = self.buffer(shape, place, next.unwrap_or(0), next.is_none());
            self.mock.desc_table().store(indexes[place], desc).unwrap();
        }
        if shape.indirect > 0 {
            let desc = self.table(shape, direct);
            self.mock.desc_table().store(indexes[direct], desc).unwrap();
        }
        indexes[0]
    }

    fn table(&mut self, shape: &Shape, first: usize) -> RawDescriptor {
        let entries = shape.indirect as u16;
        let table = DescriptorTable::new(self.memory, GuestAddress(self.tables), entries);
        for entry in 0..entries {
            let desc = self.buffer(shape, first + usize::from(entry), entry + 1, entry + 1 == entries);
            table.store(entry, desc).unwrap();
        }
        let desc = Descriptor::new(self.tables, u32::from(entries) * 16, INDIRECT, 0);
        self.tables += u64::from(entries) * 16;
        desc.into()
    }
}

/// Host memory back to guest memory, adjacent pieces of one buffer joined.
fn addresses(memory: &GuestMemory, pieces: &[Segment]) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    for piece in pieces {
        let host = piece.iov_base as u64;
        let in_region = |region: &pyvirtio_core::memory::Region| {
            let base = region.host as u64;
            (base..base + region.size).contains(&host)
        };
        let region = memory.regions().find(in_region).unwrap();
        let address = host - region.host as u64 + region.address;
        match found.last_mut() {
            Some((start, length)) if address == BORDER && *start + *length == BORDER => *length += piece.iov_len as u64,
            _ => found.push((address, piece.iov_len as u64)),
        }
    }
    found
}

/// Adjacent buffers at the border are joined like ours, and empty ones passed over.
fn oracles_addresses(descs: impl Iterator<Item = Descriptor>) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    for desc in descs.filter(|desc| desc.len() > 0) {
        let address = desc.addr().raw_value();
        match found.last_mut() {
            Some((start, length)) if address == BORDER && *start + *length == BORDER => {
                *length += u64::from(desc.len())
            }
            _ => found.push((address, u64::from(desc.len()))),
        }
    }
    found
}

fn ring(mock: &MockSplitQueue<'_, GuestMemoryMmap>, event_idx: bool, start: u16) -> RingConfig {
    RingConfig {
        size: SIZE,
        desc: mock.desc_table_addr().raw_value(),
        avail: mock.avail_addr().raw_value(),
        used: OUR_USED,
        event_idx,
        indirect: true,
        next_avail: start,
        next_used: start,
        ..RingConfig::default()
    }
}

fn oracle(mock: &MockSplitQueue<'_, GuestMemoryMmap>, event_idx: bool, start: u16) -> Queue {
    let mut queue: Queue = mock.create_queue().unwrap();
    queue.set_used_ring_address(Some(THEIR_USED as u32), Some(0));
    queue.set_event_idx(event_idx);
    queue.set_next_avail(start);
    queue.set_next_used(start);
    queue
}

/// Pop one chain on both sides, compare what they say of it, complete it, and compare whether they interrupt.
fn check_chain(driver: &Driver, memory: &GuestMemoryMmap, theirs: &mut Queue, written: u32) -> TestCaseResult {
    let chain = theirs.pop_descriptor_chain(memory).unwrap();
    let head = chain.head_index();
    let mut ours = driver.vq.pop().unwrap();
    prop_assert_eq!(ours.head(), head);
    let readable = addresses(&driver.memory, &ours.take_readable(usize::MAX));
    prop_assert_eq!(readable, oracles_addresses(chain.clone().readable()));
    let writable = addresses(&driver.memory, &ours.take_writable(usize::MAX));
    prop_assert_eq!(writable, oracles_addresses(chain.writable()));
    ours.wrote(written);
    ours.complete().unwrap();
    theirs.add_used(memory, head, written).unwrap();
    // Our first decision signals in any case; theirs does not.
    let first = driver.vq.counters.chains.get() == 1;
    let expected = theirs.needs_notification(memory).unwrap() || first;
    prop_assert_eq!(driver.interrupts() == 1, expected);
    Ok(())
}

fn check_used_rings(driver: &Driver) -> TestCaseResult {
    let (mut ours, mut theirs) = ([0; USED_BYTES], [0; USED_BYTES]);
    driver.memory.read(OUR_USED + 2, &mut ours).unwrap();
    driver.memory.read(THEIR_USED + 2, &mut theirs).unwrap();
    prop_assert_eq!(ours, theirs);
    Ok(())
}

/// Make the batch's chains available and set the used event relative to the new avail index.
fn add_batch(layout: &mut Layout<'_>, batch: &Batch) {
    layout.tables = TABLES;
    let mut avail_idx = u16::from_le(layout.mock.avail().idx().load());
    for shape in &batch.shapes {
        let head = layout.add(shape);
        layout.mock.avail().ring().ref_at(usize::from(avail_idx % SIZE)).unwrap().store(head.to_le());
        avail_idx = avail_idx.wrapping_add(1);
    }
    layout.mock.avail().idx().store(avail_idx.to_le());
    let used_event = avail_idx.wrapping_sub(batch.used_event);
    let at = layout.mock.avail_addr().unchecked_add(4 + 2 * u64::from(SIZE));
    layout.memory.write_obj(used_event.to_le(), at).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_pop_and_complete_the_same(
        order in Just((0..SIZE).collect::<Vec<_>>()).prop_shuffle(),
        start in prop_oneof![Just(0u16), Just(u16::MAX - 5), any::<u16>()],
        event_idx: bool,
        batches in prop::collection::vec(batch(), 1..12),
    ) {
        let driver = Driver::new();
        let memory = oracles_view(&driver.memory);
        let mock = MockSplitQueue::create(&memory, GuestAddress(0x1000), SIZE);
        mock.avail().idx().store(start.to_le());
        let mut theirs = oracle(&mock, event_idx, start);
        let config = ring(&mock, event_idx, start);
        driver.vq.start(driver.memory.clone(), &config, Arc::new(Closure(|_: &_| ()))).unwrap();
        let mut layout = Layout { mock: &mock, memory: &memory, order, next: 0, tables: TABLES, buffers: BUFFERS };
        for batch in batches {
            add_batch(&mut layout, &batch);
            for shape in &batch.shapes {
                check_chain(&driver, &memory, &mut theirs, shape.written)?;
            }
            prop_assert!(driver.vq.pop().is_none());
            prop_assert!(theirs.pop_descriptor_chain(&memory).is_none());
            check_used_rings(&driver)?;
        }
        prop_assert_eq!(driver.state.broken(), None);
    }
}
