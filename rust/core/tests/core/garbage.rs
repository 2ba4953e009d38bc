//! Rings full of garbage: every chain is answered or breaks the device, and no byte changes that the driver did not
//! describe as writable.

use std::sync::Arc;

use proptest::prelude::*;
use pyvirtio_core::VirtQueue;

use crate::driver::{Driver, AVAIL, BORDER, BUFFERS, DESC, END, SIZE, TABLE, USED};
use crate::packed_driver::PackedDriver;

const ENTRIES: u16 = SIZE + 2;

#[derive(Debug, Clone)]
struct Desc {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

fn desc() -> impl Strategy<Value = Desc> {
    let address = prop_oneof![
        4 => BUFFERS..BUFFERS + 0x1000,
        2 => Just(TABLE),
        1 => Just(TABLE + 16),
        1 => Just(BORDER - 8),
        1 => prop_oneof![Just(DESC), Just(AVAIL), Just(END - 4), Just(1 << 40), Just(u64::MAX - 7), any::<u64>()],
    ];
    let length = prop_oneof![6 => 0u32..100, 2 => (0u32..10).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![Just(0u16), Just(1), Just(2), Just(3), Just(4), 0u16..8, any::<u16>()];
    (address, length, flags, 0..ENTRIES + 1).prop_map(|(address, length, flags, next)| Desc {
        address,
        length,
        flags,
        next,
    })
}

/// Flags that say in which lap a descriptor of a packed ring is available or used.
fn lap() -> impl Strategy<Value = u16> {
    prop_oneof![6 => Just(0x80), 2 => Just(0x8000), 1 => Just(0), 1 => Just(0x8080)]
}

fn snapshot(driver: &Driver) -> Vec<u8> {
    let mut bytes = vec![0; END as usize];
    driver.memory.read(0, &mut bytes).unwrap();
    bytes
}

/// Make what may change equal, so that a comparison shows what must not.
fn allow(before: &mut [u8], after: &[u8], address: u64, length: u64) {
    let end = address.saturating_add(length).min(END) as usize;
    let start = (address as usize).min(end);
    before[start..end].copy_from_slice(&after[start..end]);
}

fn echo(vq: &Arc<VirtQueue>) {
    while let Some(mut chain) = vq.pop() {
        chain.read(&mut [0; 64]).unwrap();
        chain.write(&[0xee; 128]).unwrap();
        chain.complete().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn garbage_is_answered_or_breaks_the_device(
        descs in prop::collection::vec(desc(), usize::from(SIZE)),
        table in prop::collection::vec(desc(), usize::from(ENTRIES)),
        heads in prop::collection::vec(prop_oneof![8 => 0..SIZE, 1 => any::<u16>()], 1..=usize::from(SIZE)),
        ahead in prop_oneof![9 => Just(0u16), 1 => any::<u16>()],
        (indirect, event_idx) in any::<(bool, bool)>(),
    ) {
        let mut driver = Driver::with(|config| (config.indirect, config.event_idx) = (indirect, event_idx));
        driver.start(echo);
        for (index, desc) in (0..).zip(&descs) {
            driver.desc(index, desc.address, desc.length, desc.flags, desc.next);
        }
        for (index, desc) in (0..).zip(&table) {
            driver.desc_in(TABLE, index, desc.address, desc.length, desc.flags, desc.next);
        }
        heads.iter().for_each(|&head| driver.make_available(head));
        driver.store(AVAIL + 2, driver.avail_idx.wrapping_add(ahead));
        let mut before = snapshot(&driver);
        driver.vq.notify();
        let after = snapshot(&driver);
        allow(&mut before, &after, USED, 6 + 8 * u64::from(SIZE));
        // What the garbage made the device write may itself lie in the tables, so that only these are known.
        for desc in descs.iter().chain(&table).filter(|desc| desc.flags & 2 != 0) {
            allow(&mut before, &after, desc.address, u64::from(desc.length));
        }
        let written_over = |at: u64, bytes: u64| (at..at + bytes).any(|at| after[at as usize] == 0xee);
        if !written_over(DESC, 16 * u64::from(SIZE)) && !written_over(TABLE, 16 * u64::from(ENTRIES)) {
            prop_assert!(before == after);
        }
        let chains = driver.vq.counters.chains.get();
        prop_assert!(driver.state.broken().is_some() || chains >= heads.len() as u64);
        prop_assert_eq!(driver.vq.in_flight(), 0);
    }

    #[test]
    fn a_packed_ring_of_garbage_is_answered_or_breaks_the_device(
        descs in prop::collection::vec((desc(), lap(), 0..SIZE + 1), usize::from(SIZE)),
        table in prop::collection::vec(desc(), usize::from(ENTRIES)),
        again in prop::collection::vec((0..SIZE, lap()), 0..8),
        event in any::<[u8; 4]>(),
        (indirect, event_idx, in_order) in any::<(bool, bool, bool)>(),
    ) {
        let driver = PackedDriver::with(|config| {
            (config.indirect, config.event_idx, config.in_order) = (indirect, event_idx, in_order);
        });
        driver.start(echo);
        driver.memory.write(AVAIL, &event).unwrap();
        for (index, desc) in (0..).zip(&table) {
            driver.desc_in(TABLE, index, desc.address, desc.length, desc.next, desc.flags);
        }
        for (index, (desc, lap, id)) in (0..).zip(&descs) {
            driver.raw(index, (desc.address, desc.length, desc.flags & 7 | lap), *id);
        }
        let mut before = snapshot(&driver);
        driver.vq.notify();
        let after = snapshot(&driver);
        allow(&mut before, &after, DESC, 16 * u64::from(SIZE));
        allow(&mut before, &after, USED, 4);
        let known = descs.iter().map(|(desc, ..)| desc).chain(&table);
        for desc in known.filter(|desc| desc.flags & 2 != 0) {
            allow(&mut before, &after, desc.address, u64::from(desc.length));
        }
        let written_over = |at: u64, bytes: u64| (at..at + bytes).any(|at| after[at as usize] == 0xee);
        if !written_over(DESC, 16 * u64::from(SIZE)) && !written_over(TABLE, 16 * u64::from(ENTRIES)) {
            prop_assert!(before == after);
        }
        for (index, lap) in again {
            driver.raw(index, (BUFFERS, 1, lap), 0);
            driver.vq.notify();
        }
        prop_assert_eq!(driver.vq.in_flight(), 0);
    }
}
